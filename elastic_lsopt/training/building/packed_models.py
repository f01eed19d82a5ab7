"""Which models keep the documents of a packed row apart: no attention from one to another, positions from 0 in each.

transformers' masks see where positions begin anew and cut the attention there, if the model hands its positions on to
them. Many models do not, and would mix documents without a word; so only those count of which a test has shown that the
logits of a packed row are those of each document alone.
"""

from __future__ import annotations

from typing import Any

from elastic_lsopt.config.settings import SettingError

KEEPS_DOCUMENTS_APART = (
    "apertus", "arcee", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "llama", "llama4_text", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
"""Values of model_type."""


def refuse_mixed_documents(shape: Any) -> None:
    """Raise SettingError for a Hugging Face config whose model is not known to keep packed documents apart."""
    if shape.model_type not in KEEPS_DOCUMENTS_APART:
        raise SettingError(
            "packing",
            f"packing=documents: a model of type {shape.model_type!r} is not known to keep the documents of a row "
            "apart (of llama, qwen3, mistral, gpt2 and others it is: docs/data.md); use packing: none.",
        )
