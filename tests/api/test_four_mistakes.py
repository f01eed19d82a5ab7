"""The mistakes of the only public SAM for the Trainer: each is told from the paper's SAM, and ours makes none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.public_sam_trainer import told_apart


def right(kind: str, r: dict[str, Any]) -> bool:
    """The paper's weights, and beside them not more than this rank's part of a copy."""
    return r["dw"] < 1e-6 and r["kept"] < (0.6 if kind == "fsdp2" else 1.1)


@pytest.mark.parametrize("mistake", ["emptied", "scaled"])
def test_what_one_process_tells(mistake: str) -> None:
    r = told_apart("plain", mistake, ours=False)
    assert not right("plain", r) and r["dw"] > 1e-3, r


@pytest.mark.parametrize("ours", [True, pytest.param(False, marks=pytest.mark.full)])
def test_without_a_mistake_on_one_process(ours: bool) -> None:
    assert right("plain", r := told_apart("plain", "", ours)), r


@pytest.mark.parametrize(
    "mistake,ours",
    [("local_norms", False), ("", True), *(pytest.param(m, False, marks=pytest.mark.full) for m in ("cloned", ""))],
)
def test_what_shards_tell(ranks: Any, mistake: str, ours: bool) -> None:
    for r in ranks(2).run("tests.cases.public_sam_trainer:told_apart", kind="fsdp2", mistake=mistake, ours=ours):
        assert right("fsdp2", r) == (mistake == ""), r
        assert (r["dw"] > 1e-3) == (mistake == "local_norms") and (r["kept"] > 0.9) == (mistake == "cloned"), r
