"""The global order of samples: a permutation of each epoch, computed where it is asked and stored nowhere.

    epoch, index = divmod(position, n)          the cursor only grows: 0 1 2 … n-1 | n n+1 …
    index        = left * b + right             a box of a x b cells, a b >= n
    left         = (left + F(right)) mod a      even rounds
    right        = (right + F(left)) mod b      odd rounds; F mixes (seed, epoch, round)
    while index >= n: walk on                   the box is barely larger than n, so almost nobody walks

Each round can be undone, so the rounds together are a bijection of the box, and walking along its cycles to
the first cell below n is one of 0 … n-1 (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": the
generalised Feistel network and the cycle-walking cipher). Any rank finds any sample by arithmetic: nothing is
shuffled, padded, dropped or sent, and a batch may cross the end of an epoch.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic_lsopt.errors import UserError

# Below 12 rounds some permutations of five samples come measurably more often than others.
ROUNDS = 16
LARGEST = 2**40
_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring counters land far apart


class SampleOrder:
    """The sample at every position of an endless run over `samples` samples, each exactly once an epoch.

    A pure function of (seed, position): O(1) memory, about 0.2 microseconds a position, and
    0.3 ms for a small call.
    Raises UserError unless 1 <= samples <= 2**40 and 0 <= seed < 2**64.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if not 1 <= samples <= LARGEST:
            raise UserError(f"a dataset of {samples} samples cannot be ordered: give between 1 and 2**40 samples.")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed={seed} must be between 0 and 2**64 - 1.")
        self.samples = samples
        self.seed = seed
        # An even `a` keeps odd permutations reachable: where both sides are odd every round is an even one.
        a = isqrt(samples - 1) + 1
        a += a % 2
        self._a, self._b = np.uint64(a), np.uint64(-(-samples // a))

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The sample ids at these positions (any shape, >= 0), each in 0 … samples-1; the same shape.

        The result for a position does not depend on which others are asked with it.
        """
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and asked.min() < 0:
            raise ValueError(f"position {asked.min()} must be >= 0.")
        epoch, index = np.divmod(asked.reshape(-1).astype(np.uint64), np.uint64(self.samples))
        key = _mix(_mix(np.array([self.seed], dtype=np.uint64)) + epoch * np.uint64(_STRIDE))
        index = self._permute(index, key)
        while len(outside := np.flatnonzero(index >= self.samples)):
            index[outside] = self._permute(index[outside], key[outside])
        return index.astype(np.int64).reshape(asked.shape)

    def _permute(self, index: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass of the network: a bijection of the box for each key."""
        left, right = np.divmod(index, self._b)
        for r in range(ROUNDS):
            round_key = _mix(key + np.uint64((r + 1) * _STRIDE % 2**64))
            if r % 2 == 0:
                left = (left + _mix(round_key ^ right) % self._a) % self._a
            else:
                right = (right + _mix(round_key ^ left) % self._b) % self._b
        return left * self._b + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words where each input bit flips half of the output (SplitMix64, Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
