"""The export: `from_pretrained` gives bit-equal logits, a plain module loads strictly, other files stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lsopt.checkpoint.huggingface.export import Entry, cut
from elastic_lsopt.checkpoint.huggingface.file_layout import Range
from elastic_lsopt.checkpoint.safetensors_file import Head

CASES = "tests.cases.checkpoints.export:"


@pytest.mark.parametrize(
    ("kind", "world", "tied", "frozen"),
    [("fsdp2", 2, True, False), ("fsdp2", 2, False, True), ("ddp", 2, True, True), ("zero3", 2, True, True)],
)
def test_from_pretrained_gives_the_same_logits(
    ranks: Any, tmp_path: Path, kind: str, world: int, tied: bool, frozen: bool
) -> None:
    path = str(tmp_path / "model")
    for told in ranks(world).run(CASES + "hugging_face", path=path, kind=kind, tied=tied, frozen=frozen):
        assert told["equal"] and told["kind"] == "LlamaForCausalLM" and told["dtype"] == "torch.float32"
        assert told["head"] != tied  # a tied head is the embedding, and is not written twice
        assert "model.safetensors.index.json" in told["files"] and "config.json" in told["files"]
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_a_plain_module_loads_strictly(ranks: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    assert all(ranks(1 if kind == "plain" else 2).run(CASES + "plain_module", path=str(path), kind=kind))
    assert sorted(p.name for p in path.iterdir()) == [
        "HOW_TO_LOAD.txt", "export_manifest.json", "model.safetensors",
    ]  # fmt: skip


def test_other_files_stay(ranks: Any, tmp_path: Path) -> None:
    for told in ranks(2).run(CASES + "export_over", path=str(tmp_path)):
        assert f"the export to {tmp_path} failed: it holds thesis.tex and no export_manifest.json" in told
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_goes_wrong_on_one_rank_ends_the_export_on_all(ranks: Any, tmp_path: Path) -> None:
    """Also what is no error of the file system: the others used to wait for an hour."""
    told = ranks(2).run(CASES + "spoilt", path=str(tmp_path / "model"))
    assert told == ["ValueError: no such token", "PeerFailed: rank 0: no such token"]
    assert [*tmp_path.iterdir()] == []


def test_files_are_cut_by_bytes() -> None:
    entries = [Entry(Head(str(i), torch.float32, (n,)), Range(str(i), 0, (n,))) for i, n in enumerate([2, 3, 9, 1, 1])]
    assert [[e.source.name for e in part] for part in cut(entries, 20)] == [["0", "1"], ["2"], ["3", "4"]]
