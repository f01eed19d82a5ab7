"""Wrong labels, the same for all runs of a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def wrong_labels(labels: NDArray[np.int64], classes: int, share: float, seed: int) -> NDArray[np.int64]:
    """A copy in which this share has another class. Those that are wrong at a low share are so at a higher one."""
    n, draw = len(labels), np.random.default_rng(seed)
    order, shift = draw.permutation(n), draw.integers(1, classes, size=n)
    wrong: Any = order[: round(share * n)]
    out = labels.copy()
    out[wrong] = (out[wrong] + shift[wrong]) % classes
    return out
