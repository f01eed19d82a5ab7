"""What trl's trainers count in `compute_loss`: tokens, entropy, accuracy. Only the pass at the weights counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COUNTED = ("_metrics", "_total_train_tokens")
"""trl 1.16: metrics by mode, until they are logged, and the tokens of the run."""


@contextmanager
def not_counted(trainer: Any) -> Iterator[None]:
    """Afterwards the trainer's counts are what they were: a step on a batch counts it once, whatever its passes."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in COUNTED if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)
