"""A packed row gives the logits of each of its documents alone, on every model that is said to keep them apart."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from elastic_lsopt.config.settings import SettingError
from elastic_lsopt.training.building.packed_models import KEEPS_DOCUMENTS_APART, refuse_mixed_documents
from elastic_lsopt.training.datasets.batches import collate_packed

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_inner": 64, "n_positions": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "rotary_dim": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False, "sliding_window": 6,
}  # fmt: skip
DAILY = ("llama", "gpt2", "gemma2", "mistral", "qwen3_moe")


def small(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[model_type]
    aliases = kind.attribute_map
    own = set(inspect.signature(kind.__init__).parameters) | set(aliases)
    given = {k: v for k, v in SMALL.items() if k in own and aliases.get(k, k) not in set(SMALL) - {k}}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**given)).eval()


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in DAILY else pytest.mark.full) for t in KEEPS_DOCUMENTS_APART]
)
def test_the_documents_of_a_row_do_not_see_each_other(model_type: str) -> None:
    model, draw = small(model_type), torch.Generator().manual_seed(1)
    lengths = [[9, 12, 5], [3, 8]]  # the second row is padded; windows of 6 tokens are shorter than documents
    documents = [[torch.randint(3, 60, (n,), generator=draw) for n in row] for row in lengths]
    batch = collate_packed([[(d.numpy(), d.numpy()) for d in row] for row in documents], padding=0)
    del batch["labels"]
    assert sorted(batch) == ["input_ids", "position_ids"]
    apart = []
    for attention in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(attention)
        except ValueError:  # gemma2 has no sdpa
            continue
        with torch.no_grad():
            logits, mixed = model(**batch).logits, model(input_ids=batch["input_ids"]).logits
            for row, alone in enumerate(documents):
                expected = torch.cat([model(input_ids=d[None]).logits[0] for d in alone])
                assert torch.allclose(logits[row, : len(expected)], expected, atol=1e-5), attention
                apart.append((mixed[row, : len(expected)] - expected).abs().max().item())
    assert max(apart) > 1e-3  # without the positions the documents do see each other


@pytest.mark.fast
def test_others_are_refused_in_one_line() -> None:
    from transformers import CONFIG_MAPPING

    for model_type in ("falcon", "opt", "mamba"):
        with pytest.raises(
            SettingError, match=f"type {model_type!r} is not known to keep .* use packing: none"
        ) as said:
            refuse_mixed_documents(CONFIG_MAPPING[model_type]())
        assert said.value.key == "packing" and "\n" not in str(said.value)
