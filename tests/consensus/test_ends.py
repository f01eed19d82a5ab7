"""The edges of a job: replicas that are started again, have no samples left, or are late for the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

BETA = 0.9
"""EASGD's."""


def test_who_is_late_after_a_new_start_does_not_bring_an_old_centre_back(ranks: Any) -> None:
    """Meetings are numbered anew in each life of a job: the last exchange of the earlier one is no newer than the first
    of this one. The centre goes on from where the others have moved it: c + beta mean (x_i - c)."""
    out = ranks(3).run("tests.cases.consensus_ends:started_again")
    points = [torch.tensor(r["x"], dtype=torch.float64) for r in out]
    centre, old = (torch.tensor(out[i]["centre"], dtype=torch.float64) for i in (0, 2))
    assert float((centre - old).abs().max()) > 0.01, "the others have not moved it: the test sees nothing"
    wanted = centre + BETA * torch.stack([p - centre for p in points]).mean(0)
    for r in out:
        assert r["told"][-1] == [[0, 1, 2], True], r["told"]
        assert float((torch.tensor(r["after"], dtype=torch.float64) - wanted).abs().max()) < 1e-12


def test_the_end(ranks: Any) -> None:
    """An exchange in which one replica has no samples is one all the same (MGRAWA weighs it by none); who has lost its
    numbers, or comes for one more exchange, is given the model that the others form."""
    first, second = ranks(2).run("tests.cases.consensus_ends:at_the_end")
    assert first["well"] and second["well"]
    assert first["lost"] == second["lost"] == pytest.approx(first["x"], abs=1e-12)
    assert set(first["late"]) == {1.0} and first["late"] == second["late"]
