"""Adapters leave as peft's folder and as a merged model; both give the trained model's logits elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws.cover import full_but

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
    "kind,world,name", full_but([("fsdp2", 3, "bert"), ("zero3", 2, "llama")], WHERE, ("llama", "gpt2", "bert"))
)
def test_others_load_what_was_trained(ranks: Any, tmp_path: Path, kind: str, world: int, name: str) -> None:
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, name=name):
        assert told["adapter"] <= 1e-5 and told["merged"] <= 1e-5, told
        assert told["kind"] == KINDS[name] and not told["strange"], told
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(told["files"])
        assert ("base_model.model.classifier.weight" in told["in the adapter"]) == (name == "bert")


@pytest.mark.full
@pytest.mark.parametrize("kind,world", [w for w in WHERE if "zero" not in w[0]])
def test_a_bf16_base_under_tied_embeddings(ranks: Any, tmp_path: Path, kind: str, world: int) -> None:
    """The merged model is fp32, and the engine's forward rounds to bf16: alike to that. peft computes the same bits."""
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, name="tied"):
        assert told["adapter"] == 0.0 and told["merged"] <= 2e-2, told
        assert told["kind"] == "LlamaForCausalLM" and not told["strange"], told


@pytest.mark.full
@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2)])
def test_a_users_own_peft_model(ranks: Any, tmp_path: Path, kind: str, world: int) -> None:
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, name="llama", own=True):
        assert told["adapter"] <= 1e-5 and told["merged"] <= 1e-5, told
        assert told["kind"] == "LlamaForCausalLM" and not told["strange"], told


@pytest.mark.parametrize(
    "kind,world,name,own",
    full_but(
        [("fsdp2", 2, "bert", False)],
        [w for w in WHERE if w[0] in ("plain", "fsdp2", "zero2", "zero3")], ("llama", "gpt2", "bert"), (False,),
    )
    + full_but([("zero3", 2, "llama", True)], [("plain", 1), ("fsdp2", 2), ("zero3", 2)], ("llama",), (True,)),
)  # fmt: skip
def test_bi_lora_leaves_without_its_adversary(
    ranks: Any, tmp_path: Path, kind: str, world: int, name: str, own: bool
) -> None:
    """What others load is plain LoRA, in its files and in its logits."""
    more = {"name": name, "own": own, "adversary": True}
    for told in ranks(world).run(CASES + "exported", path=str(tmp_path / "run"), kind=kind, **more):
        assert told["adapter"] <= 1e-5 and told["merged"] <= 1e-5 and told["trained"] > 1e-4, told
        assert told["kind"] == KINDS[name] and not told["strange"], told
        assert told["files"] == ["adapter_config.json", "adapter_model.safetensors", "export_manifest.json"]
        assert not any("adversary" in n for n in told["in the adapter"])
        assert ("base_model.model.classifier.weight" in told["in the adapter"]) == (name == "bert")


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=pytest.mark.full)])
def test_checkpoint_and_mirror_hold_the_adapters_only(ranks: Any, tmp_path: Path, kind: str) -> None:
    """Weights and momentum of the adapters, 1/N per rank in a version, and less than 24 KiB beside them."""
    for told in ranks(2).run(CASES + "kept_bytes", path=str(tmp_path), kind=kind):
        assert told["saved"] <= 2 * told["adapters"] + 24 * 2**10, told
        assert told["mirrored"] <= told["adapters"] + 24 * 2**10, told
        assert told["whole"] > 10 * told["adapters"], told
