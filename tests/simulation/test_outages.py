"""Failures that are drawn, and those that a file tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastic_lsopt.errors import UserError
from elastic_lsopt.simulation.outages import drawn
from elastic_lsopt.simulation.scenario import Scenario
from elastic_lsopt.simulation.trace import read_trace

pytestmark = pytest.mark.fast


def test_failures_are_a_poisson_process_of_all_gpus() -> None:
    scenario = Scenario(replicas=1000, gpus=4, mtbf_h=1000, days=10, replace_s=60, restart_s=0)
    outages = drawn(scenario)
    wanted = 4000 * 240 / 1000
    assert len(outages) == pytest.approx(wanted, abs=4 * wanted**0.5)
    assert (np.diff(outages.down_s) >= 0).all() and (outages.down_s < 864_000).all()
    assert np.allclose(outages.up_s - outages.down_s, 60) and not outages.whole
    gaps = np.diff(outages.down_s)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)  # exponential
    assert np.bincount(outages.replica, minlength=1000).var() == pytest.approx(wanted / 1000, rel=0.3)


def test_the_same_seed_draws_the_same_failures_and_no_failures_are_none() -> None:
    one, same, other = (drawn(Scenario(replicas=500, mtbf_h=1000, seed=s)) for s in (1, 1, 2))
    assert (one.down_s == same.down_s).all() and len(one) != len(other)
    assert len(drawn(Scenario(mtbf_h=float("inf")))) == 0


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("replica, down_s, up_s\n2,50,60\n\n0,10.5,400\n2,60,61\n")
    trace = read_trace(path, 3)
    assert list(trace) == [(0, 10.5, 400.0), (2, 50.0, 60.0), (2, 60.0, 61.0)] and trace.whole
    assert len(trace.until(55)) == 2
    assert list(trace.back(100)) == [(0, 10.5, 500.0), (2, 50.0, 161.0)]  # lost again while it restarts
    path.write_text("replica,down_s,up_s\n")
    assert len(read_trace(path, 3)) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ":1: the first line must read replica,down_s,up_s."),
        ("a,b,c\n", ":1: the first line must read"),
        ("1,2,3\n", ":1: the first line must read"),
        ("replica,down_s,up_s\n1,2\n", ":2: 2 cells; each line has 3"),
        ("replica,down_s,up_s\n1,2,3\n-1,2,3\n", ":3: replica='-1' must be a whole number >= 0."),
        ("replica,down_s,up_s\n1.5,2,3\n", ":2: replica='1.5' must be"),
        ("replica,down_s,up_s\n8,2,3\n", ":2: replica=8 must be below --replicas 8; replicas count from 0."),
        ("replica,down_s,up_s\n1,x,3\n", ":2: 'x' must be seconds >= 0"),
        ("replica,down_s,up_s\n1,-2,3\n", ":2: '-2' must be seconds >= 0"),
        ("replica,down_s,up_s\n1,nan,3\n", ":2: 'nan' must be seconds >= 0"),
        ("replica,down_s,up_s\n1,2,inf\n", ":2: 'inf' must be seconds >= 0"),
        ("replica,down_s,up_s\n1,5,3\n", ":2: up_s=3 must be >= down_s=5."),
        ("replica,down_s,up_s\n1,5,9\n2,0,100\n1,2,6\n", ":2: replica 1 is lost at 5 while line 4 has it away until 6"),
        ('replica,down_s,up_s\n1,"5,9\n', ":2: "),
        ("replica,down_s,up_s\n1,2,3\x00\n", ":2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_trace(path, 8)
    assert str(caught.value).startswith(f"{path}{says}") and "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_trace(path, 8)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is no text in UTF-8"):
        read_trace(path, 8)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_trace(tmp_path, 8)
