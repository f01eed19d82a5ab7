"""Adapters leave as peft's folder and as a merged model; both give the trained model's logits elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws.cover import daily_of

CASES = "tests.cases.lora:"
KINDS = {
    "llama": "LlamaForCausalLM",
    "tied": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
}
WHERE = [
    ("plain", 1),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("hsdp", 2),
    ("ddp", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3-offload", 2),
]


@pytest.mark.parametrize(
    "kind,world,name",
    daily_of(
        [(kind, world, name) for kind, world in WHERE for name in KINDS if name != "tied" or "zero" not in kind], seed=1
    ),
)
def test_others_load_what_was_trained(ranks: Any, tmp_path: Path, kind: str, world: int, name: str) -> None:
    """`tied` has a bf16 base, whose engine rounds its activations: fp32 and bf16 forwards are compared there."""
    limit = 2e-2 if name == "tied" else 1e-5
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, name=name):
        assert told["adapter"] <= (0.0 if name == "tied" else 1e-5) and told["merged"] <= limit, told
        assert told["kind"] == KINDS[name] and not told["strange"], told
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(told["files"])
        assert ("base_model.model.classifier.weight" in told["in the adapter"]) == (name == "bert")


@pytest.mark.parametrize("kind,world", [pytest.param("plain", 1, marks=pytest.mark.full), ("fsdp2", 2)])
def test_a_users_own_peft_model(ranks: Any, tmp_path: Path, kind: str, world: int) -> None:
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, name="llama", own=True):
        assert told["adapter"] <= 1e-5 and told["merged"] <= 1e-5, told
        assert told["kind"] == "LlamaForCausalLM" and not told["strange"], told


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=pytest.mark.full)])
def test_checkpoint_and_mirror_hold_the_adapters_only(ranks: Any, tmp_path: Path, kind: str) -> None:
    """Weights and momentum of the adapters, 1/N per rank in a version, and less than 24 KiB beside them."""
    for told in ranks(2).run(CASES + "kept_bytes", path=str(tmp_path), kind=kind):
        assert told["saved"] <= 2 * told["adapters"] + 24 * 2**10, told
        assert told["mirrored"] <= told["adapters"] + 24 * 2**10, told
        assert told["whole"] > 10 * told["adapters"], told
