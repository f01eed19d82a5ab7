"""A seeded part of `make chaos`, some minutes long: events at living jobs, law 5 after them (see driver.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.driver import Event, Round

EVENTS = 3


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("backend", "seed"),
    [("zero3", 4), *(pytest.param(*way, marks=pytest.mark.full) for way in (("fsdp2", 2), ("zero2", 3)))],
)
def test_a_job_that_is_disturbed_again_and_again_is_the_undisturbed_one(
    backend: str, seed: int, tmp_path: Path
) -> None:
    seen: list[Event] = []
    Round(backend, seed, EVENTS, tmp_path / "run", seen.append).run()
    assert len(seen) == EVENTS
