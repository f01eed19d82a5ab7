"""The networks of a study, each with an identity that says all that its numbers depend on.

    id = blake2b(settings of the network, how it is trained, on what, the study's seed)

So a study that is started again, with more values in its grid, finds what it has done before; and one with another
`stop_loss` does not take old results for its own. Measures are no part of it: see `cells_file.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import product

from elastic_lsopt.config.study import AXES, StudyConfig

SHARED = ("dataset", "eval_fraction", "stop_loss", "max_epochs", "seed")
"""Settings that all networks of a study have in common."""
NAMES = 2
"""Raised when a measure's name comes to mean another number: what was recorded under the old one is not taken."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network of the grid; the fields are named and ordered as the grid's axes."""

    width: int
    depth: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    momentum: float
    label_noise: float
    seed: int

    def settings(self) -> dict[str, int | float]:
        """The hyper-parameters by name."""
        return asdict(self)

    def id(self, config: StudyConfig) -> str:
        """Twelve hexadecimal digits; the same on every machine."""
        shared = {f"study_{key}": getattr(config, key) for key in SHARED}
        text = json.dumps(self.settings() | shared | {"names": NAMES}, sort_keys=True)
        return blake2b(text.encode(), digest_size=6).hexdigest()

    def __str__(self) -> str:
        return " ".join(f"{axis}={value:g}" for axis, value in self.settings().items())


def cells(config: StudyConfig) -> list[Cell]:
    """All combinations of the grid, the last axis varied the fastest."""
    values = (getattr(config.grid, axis) for axis in AXES)
    return [Cell(**dict(zip(AXES, chosen, strict=True))) for chosen in product(*values)]
