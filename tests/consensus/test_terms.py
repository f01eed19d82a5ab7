"""Replicas that do not have alike what they must are refused in one line when they first meet, in real processes."""

from __future__ import annotations

import re
from typing import Any

WRONG = {
    "rule": r"replica 0 has rule=local_sgd and replica 1 has rule=easgd; .* give all of them the same\.",
    "hyper-parameter": r"replica 0 has pull=0\.5 and replica 1 has pull=0\.9; .* give all of them the same\.",
    "format": r"replica 0 has bits=32 and replica 1 has bits=8; .* give all of them the same\.",
    "frozen": r"replica 0 has parameters=9 of \d+ .* and replica 1 has parameters=8 of \d+ .* the same\.",
}


def test_other_terms(ranks: Any) -> None:
    for first, second in zip(*ranks(2).run("tests.cases.consensus_ends:other_terms"), strict=True):
        kind, said = first
        assert first == second and said[0] == "UserError"
        assert re.fullmatch(WRONG[kind], said[1]), said


def test_other_beginnings(ranks: Any) -> None:
    """They go on, as each may come from a checkpoint of its own, but are told."""
    alike, apart = ranks(2).run("tests.cases.consensus_ends:other_beginnings")[0]
    assert alike == []
    [line] = apart
    assert line.startswith("replica 1 has begun from other weights than replica 0 (norms ")
