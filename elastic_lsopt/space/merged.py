"""Noise on weights that are no part of the space: the layers that adapters are added to, as one with their products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class MergedNoise(Protocol):
    """The merged weights W + s B A of a model's adapted layers."""

    def noised(self, seed: int, step: int, draw: int, std: Callable[[int], float]) -> AbstractContextManager[None]:
        """Inside, forwards see each adapted layer at W + s B A + E (collective: one gather of the adapters).

        E_ij is N(0, 1) noise of (seed, step, draw, the layer's weight, its element) times std(n) ||W'_i||, where W' is
        the merged weight and n the length of its rows.
        """
        ...
