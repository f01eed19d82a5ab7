"""The journal's line of a change: what all ranks say of it, and the generations before it that made no step."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import Change

pytestmark = pytest.mark.fast
OWN: dict[str, Any] = {
    "generation": 7, "why": "joined: n4", "workers": ("a",), "nodes": ("n1",), "gone": (), "samples": 80, "step": 10,
    "source": "memory", "redone_steps": 0, "bytes_moved": 5, "seconds": {}, "before": None, "after": {},
    "survives_node_loss": False,
}  # fmt: skip


def test_the_slowest_rank_and_all_bytes_count() -> None:
    ranks = [({"form": 0.1, "build": 2.0}, 5, 0), ({"form": 0.3, "build": 1.0, "wait": 0.2}, 7, 1)]
    line = Change(**OWN).of_all(ranks, [("joined: n4", ())])
    assert line.seconds == {"form": 0.3, "build": 2.0, "wait": 0.2}
    assert (line.bytes_moved, line.redone_steps, line.why, line.gone) == (12, 1, "joined: n4", ())


def test_generations_without_a_step_are_told_with_the_next() -> None:
    told = [("died: n1/1", ("n1/1",)), ("died: n2/1", ("n2/1",)), ("joined: n4", ())]
    line = Change(**OWN).of_all([({}, 0, 0)], told)
    assert line.why == "died: n1/1; then died: n2/1; then joined: n4" and line.gone == ("n1/1", "n2/1")
