"""Some of the parameters as a space of their own, on the very tensors of the whole one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic_lsopt.space.dealing import Dealing
from elastic_lsopt.space.layout import Layout, Piece, Shards


class RestrictedShards(Shards):
    """The shards of the parameters numbered `chosen` (in their order); `places` are their pieces among all pieces."""

    def __init__(self, shards: Shards, chosen: Sequence[int]) -> None:
        self._shards, self._chosen = shards, tuple(chosen)
        number = {p: i for i, p in enumerate(self._chosen)}
        whole = shards.layout
        self.places = [i for i, piece in enumerate(whole.pieces) if piece.parameter in number]
        kept = [whole.pieces[i] for i in self.places]
        self.layout = Layout(
            tuple(whole.parameters[p] for p in self._chosen),
            tuple(Piece(number[p.parameter], p.offset, p.length, p.slot, p.start) for p in kept),
        )
        self.device = shards.device

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of one tensor per piece of the whole that are of these parameters."""
        return [tensors[i] for i in self.places]

    @property
    def compute_dtype(self):  # type: ignore[override]
        return self._shards.compute_dtype

    @property
    def masters(self) -> list[Tensor]:
        return self.of(self._shards.masters)

    @property
    def working(self) -> list[Tensor]:
        return self.of(self._shards.working)

    @property
    def separate_master(self) -> bool:
        return self._shards.separate_master

    @property
    def sole(self) -> bool:
        return self._shards.sole

    def drop_gathered(self) -> None:
        self._shards.drop_gathered()

    def refresh_gathered(self) -> None:
        self._shards.refresh_gathered()

    def sum_pieces_(self, values: Tensor) -> Tensor:
        return self._shards.sum_pieces_(values)

    def dealing(self, parameters: Sequence[int], dtype: torch.dtype) -> Dealing:
        return Renumbered(self._shards.dealing([self._chosen[p] for p in parameters], dtype), self._chosen)

    def base_state(self, key: str) -> list[Tensor]:
        return self.of(self._shards.base_state(key))

    def report_failure(self, error: BaseException) -> None:
        self._shards.report_failure(error)

    def repair(self) -> None:
        self._shards.repair()


class Renumbered(Dealing):
    """A dealing of the whole space's parameters, by the numbers that they have among the chosen ones."""

    def __init__(self, whole: Dealing, chosen: Sequence[int]) -> None:
        self._whole, self._chosen = whole, chosen
        self._number = {p: i for i, p in enumerate(chosen)}
        self.mine = tuple(self._number[p] for p in whole.mine)

    def gather(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        return {self._number[p]: t for p, t in self._whole.gather(pieces).items()}

    def scatter(self, wholes: Mapping[int, Tensor]) -> list[Tensor]:
        return self._whole.scatter({self._chosen[p]: t for p, t in wholes.items()})
