"""A crash, a full disk, a state that cannot be saved: the last good checkpoint stays and all ranks know why."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt import checkpoint
from elastic_lsopt.backends.replicated import Replicated
from tests.processes.ranks import RankFailure

CASES = "tests.cases.checkpoints.failures:"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("rank", "where", "survives"),
    [(1, "in its file", 1), (0, "at the manifest", 1), (0, "at the rename", 1), (0, "while the old one goes", 2)],
)
def test_a_rank_killed_while_writing_leaves_a_good_checkpoint(
    ranks: Any, tmp_path: Path, rank: int, where: str, survives: int
) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(CASES + "killed", path=str(tmp_path), rank=rank, where=where)
    assert f"rank {rank}: died" in str(failure.value) and f"rank {1 - rank}: passed" in str(failure.value)
    good = checkpoint.latest(tmp_path)
    assert good is not None and good.name == f"checkpoint-{survives}"
    model = nn.ModuleDict({"first": nn.Linear(1500, 1500)})
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    engine = lso.Engine(Replicated(model.named_parameters(), base, model=model), lso.Plain(), loss_fn=lambda m, b: m(b))
    checkpoints = checkpoint.Checkpointer(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]  # what was half done is gone
    found = checkpoints.resume(engine)
    assert found is not None and found.step == survives
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root; the limit of a process on its files is tested without")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_no_space_left_fails_the_save_and_not_the_training(ranks: Any, small_disk: Path) -> None:
    for told in ranks(2).run(CASES + "full_disk", path=str(small_disk)):
        first, second, third = told["errors"]
        assert first is None and third is None and told["steps"] == 3
        assert second.startswith("rank ") and "No space left on device" in second and "\n" not in second
        assert told["names"] == ["ballast", "checkpoint-1"]
    assert checkpoint.latest(small_disk) == small_disk / "checkpoint-3"


def test_one_rank_that_cannot_write_fails_the_save_of_all(ranks: Any, tmp_path: Path) -> None:
    told = ranks(2).run(CASES + "file_limit_on_rank_1", path=str(tmp_path))
    assert told[0] == told[1] and told[0][1] is None
    assert told[0][0].startswith("rank 1: File too large")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("what", "expected", "elsewhere"),
    [
        (
            "state",
            "Unsupported: the optimizer's state 'rows' of parameter tiny is a tensor of shape (5,)",
            "UserError: rank 1: ",
        ),
        ("stale", "StaleWeights: a save is refused", "PeerFailed: rank 1: a save is refused"),
        ("extra", "UserError: extra['loader'] cannot be saved", "UserError: rank 1: extra['loader']"),
    ],
)
def test_what_cannot_be_saved_is_refused_on_all_ranks(
    ranks: Any, tmp_path: Path, what: str, expected: str, elsewhere: str
) -> None:
    other, own = ranks(2).run(CASES + "refused", path=str(tmp_path), what=what)
    assert own.startswith(expected) and other.startswith(elsewhere)
    assert "\n" not in own + other


def test_nothing_is_unpickled(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1).run(CASES + "unpickled", path=str(tmp_path)) == [[]]
    for source in Path(checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "torch.load"} & {*names, getattr(node, "module", None)}, source
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), source
