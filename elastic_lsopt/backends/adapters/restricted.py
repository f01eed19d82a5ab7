"""Some of a backend's trained parameters for measures, as if the others were frozen; the framework knows nothing of it.

The pass is the whole backend's, with the gradients of all in its buffer; what it gives out is of the chosen alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.restricted import RestrictedShards


class RestrictedBackend(RestrictedShards):
    """The parameters numbered `chosen` (in their order), on the very tensors of `backend`: forwards, backwards and
    products with the curvature, and no steps."""

    def __init__(self, backend: Backend, chosen: Sequence[int]) -> None:
        super().__init__(backend, chosen)
        self.whole = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.whole.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.whole.compute_dtype = dtype

    @property
    def observed(self) -> bool:
        return self.whole.observed

    @observed.setter
    def observed(self, observed: bool) -> None:
        self.whole.observed = observed

    def gradients(self) -> list[Tensor]:
        return self.of(self.whole.gradients())

    def own(self, wanted: Sequence[int]) -> list[int]:
        chosen = set(wanted)
        return [i for i, piece in enumerate(self.layout.pieces) if piece.parameter in chosen]

    def all_gather(self, pieces: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        return self.whole.all_gather(pieces, [self._chosen[p] for p in wanted], dtype)

    def reduce_scatter(
        self, wholes: Sequence[Tensor | None], wanted: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        return self.whole.reduce_scatter(wholes, [self._chosen[p] for p in wanted], dtype)


def restricted_space(space: ParameterSpace, backend: Backend, chosen: Sequence[int]) -> tuple[ParameterSpace, Any]:
    """These parameters as a space and a backend for measures; moves in one space are seen by the other."""
    shards = RestrictedBackend(backend, chosen)
    part = ParameterSpace(shards, space.seed)
    part.copies = space.copies
    return part, shards
