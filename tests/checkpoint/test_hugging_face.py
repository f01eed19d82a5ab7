"""A Hugging Face folder on sharded parameters: transformers' own logits, also after training and an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.checkpoints.hugging_face import SHAPES

CASES = "tests.cases.checkpoints.hugging_face:"
KINDS = ("fsdp2", "zero3", "hsdp", "ddp", "zero2")
DAILY = {
    ("llama", "fsdp2", 3), ("qwen3", "zero3", 2), ("gemma3_text", "fsdp2", 2), ("mistral", "zero3", 3),
    ("gpt2", "hsdp", 2), ("bert", "zero3", 2), ("mixtral", "fsdp2", 2), ("mixtral", "zero3", 3), ("qwen3", "ddp", 2),
    ("llama", "zero2", 2),
}  # fmt: skip
PRODUCT = [
    pytest.param(shape, kind, world, marks=() if (shape, kind, world) in DAILY else pytest.mark.full)
    for shape in SHAPES
    for kind in KINDS
    for world in (1, 2, 3)
    if kind != "hsdp" or world == 2
]


@pytest.mark.parametrize(("shape", "kind", "world"), PRODUCT)
def test_transformers_logits_before_and_after(ranks: Any, tmp_path: Path, shape: str, kind: str, world: int) -> None:
    for told in ranks(world).run(CASES + "loads_trains_and_exports", path=str(tmp_path), model_type=shape, kind=kind):
        assert told["loaded"] < 1e-5 and told["exported"] < 1e-5, told
        assert told["finite"] and told["trained"] > 1e-3 and told["same_keys"], told
