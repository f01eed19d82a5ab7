"""A Hugging Face folder on sharded parameters: transformers' own logits, also after training and an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.checkpoints.hugging_face import SHAPES
from tests.docs.blocks import program

CASES = "tests.cases.checkpoints.hugging_face:"
KINDS = ("fsdp2", "zero3", "hsdp", "ddp", "zero2")
DAILY = {
    ("llama", "fsdp2", 3), ("qwen3", "zero3", 2), ("gpt2", "hsdp", 2), ("mixtral", "zero3", 3), ("mixtral", "fsdp2", 2),
    ("qwen3", "ddp", 2),
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


BF16 = [pytest.param(kind, marks=() if kind == "zero3" else pytest.mark.full) for kind in KINDS if kind != "ddp"]


@pytest.mark.parametrize("kind", BF16)
def test_masters_keep_all_bits_of_the_files(ranks: Any, tmp_path: Path, kind: str) -> None:
    assert all(ranks(2).run(CASES + "masters_equal_the_files", path=str(tmp_path), kind=kind))


@pytest.mark.parametrize("kind", ["fsdp2", "zero3", pytest.param("zero2", marks=pytest.mark.full)])
def test_what_is_not_trained_is_filled_too(ranks: Any, tmp_path: Path, kind: str) -> None:
    assert max(ranks(2).run(CASES + "frozen_parts", path=str(tmp_path), kind=kind)) < 1e-5


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=pytest.mark.full)])
def test_weights_are_no_mapping_of_the_files(ranks: Any, tmp_path: Path, kind: str) -> None:
    assert ranks(2).run(CASES + "files_overwritten", path=str(tmp_path), kind=kind) == [0.0, 0.0]


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_a_load_costs_the_shards_and_less_than_a_block(ranks: Any, tmp_path: Path, kind: str, world: int) -> None:
    case = CASES + "peak_of_a_load"
    for told in ranks(world).run(case, path=str(tmp_path), kind=kind, hidden=512, layers=12, timeout_s=120):
        assert told["peak"] < 0.9, told


DRAWN = [
    ("fsdp2", 2), ("zero3", 3), pytest.param("ddp", 2, marks=pytest.mark.full),
    pytest.param("zero2", 2, marks=pytest.mark.full), pytest.param("hsdp", 2, marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "world"), DRAWN)
@pytest.mark.parametrize("shape", ["mixtral", pytest.param("gpt2", marks=pytest.mark.full)])
def test_a_model_from_scratch_begins_alike_everywhere(
    ranks: Any, tmp_path: Path, kind: str, world: int, shape: str
) -> None:
    case = CASES + "first_weights"
    alone, *_ = ranks(1).run(case, path=str(tmp_path), kind="ddp", model_type=shape)
    assert len(set(alone.values())) > 3
    for told in ranks(world).run(case, path=str(tmp_path), kind=kind, model_type=shape):
        assert told == alone


def test_the_program_of_the_page(ranks: Any, tmp_path: Path) -> None:
    case = CASES + "the_pages_program"
    assert max(ranks(2).run(case, path=str(tmp_path), program=program("docs/large-models.md"))) < 1e-5
