"""Another order of the samples from a rewind on: what is left of the epoch is permuted once more, and all later epochs.

    0 1 2 … c-1 | c … n-1 | n …         rewound at c: c … n-1 change places among themselves, n … by the new seed

Positions before c stay as they were, because their samples are used up; so each sample still comes once per epoch. A
second rewind permutes what the first one has made. The order is a pure function of (seed, rewinds, position).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic_lsopt.data.order import SampleOrder

_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring numbers give seeds that are far apart


def rewound(order: SampleOrder, rewinds: Sequence[int], positions: ArrayLike) -> NDArray[np.int64]:
    """The sample ids at these positions after rewinds to the cursors `rewinds` (>= 0), in the order of their time."""
    at = np.array(positions, dtype=np.int64)
    for number in range(len(rewinds), 0, -1):
        at = _moved(at, rewinds[number - 1], order.samples, (order.seed + number * _STRIDE) % 2**64)
    return order.at(at)


def _moved(positions: NDArray[np.int64], cursor: int, n: int, seed: int) -> NDArray[np.int64]:
    """The positions, permuted from the cursor on: within its epoch, and within each later one."""
    end = (cursor // n + 1) * n
    out = positions.copy()
    rest, later = (cursor <= positions) & (positions < end), positions >= end
    out[rest] = cursor + SampleOrder(end - cursor, seed).at(positions[rest] - cursor)
    out[later] = positions[later] // n * n + SampleOrder(n, seed).at(positions[later])
    return out
