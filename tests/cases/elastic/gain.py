"""AdaScale's gain on every way to lay the weights out."""

from __future__ import annotations

from typing import Any

import elastic_lsopt as lso
from elastic_lsopt.schedules.adascale import GainMonitor, measured
from tests.cases.engines import batches, build, close, mine, net


def gain_of(kind: str) -> Any:
    """(variance, square, this rank's bytes of the Vector) after four steps."""
    monitor = GainMonitor(horizon_samples=60.0)
    engine = build(kind, net(), lso.Plain(), base="sgd", total_samples=84, keep=[monitor])
    for units in batches(4, 6, last=1):
        engine.train_batch(mine(units))
    gain = measured(engine.families)
    assert gain is not None
    held = engine.families["gain"].state_dict()["previous"].local_bytes  # type: ignore[union-attr]
    close(engine)
    return gain.variance, gain.square, held
