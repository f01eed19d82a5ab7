"""How parameters are dealt over the ranks that hold their pieces, or over those that hold all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.space.dealing import Dealing, deal
from elastic_lsopt.space.layout import Layout

Run = tuple[int, int, int]
"""Parameter, offset, length."""


def cost(shape: Sequence[int]) -> float:
    """Of work on a whole matrix whose products are of its shorter side."""
    rows = shape[0] if shape else 1
    columns = 1
    for n in shape[1:]:
        columns *= n
    return float(rows) * columns * min(rows, columns)


class Sharded(Dealing):
    """Every rank holds pieces: one all-to-all there, one back."""

    def __init__(
        self, layout: Layout, everyones: Sequence[Sequence[Run]], parameters: Sequence[int], group: dist.ProcessGroup,
        like: Tensor,
    ) -> None:  # fmt: skip
        self._layout, self._group, self._like = layout, group, like
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        owners = deal([cost(layout.parameters[p].shape) for p in parameters], self._size)
        self._owner = dict(zip(parameters, owners, strict=True))
        self.mine = tuple(p for p in parameters if self._owner[p] == self._rank)
        self._runs = [[run for run in runs if run[0] in self._owner] for runs in everyones]

    def _of(self, rank: int, owner: int) -> list[Run]:
        """What `rank` holds of the parameters that `owner` gets."""
        return [run for run in self._runs[rank] if self._owner[run[0]] == owner]

    def _exchange(self, parts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        """`parts[r]` to rank r; what each rank has sent here, `sizes[r]` elements of it, flat."""
        sent = torch.cat([self._like, *(t.reshape(-1).to(self._like) for part in parts for t in part)])
        received, size = self._like.new_empty(sum(sizes)), self._like.element_size()
        dist.all_to_all_single(  # as bytes: gloo has no all-to-all of bf16
            received.view(torch.uint8), sent.view(torch.uint8), [n * size for n in sizes],
            [sum(t.numel() for t in part) * size for part in parts], group=self._group,
        )  # fmt: skip
        return list(received.split(list(sizes)))

    def gather(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        own = dict(zip(self._runs[self._rank], pieces, strict=True))
        parts = [[own[run] for run in self._of(self._rank, owner)] for owner in range(self._size)]
        sizes = [sum(n for _, _, n in self._of(rank, self._rank)) for rank in range(self._size)]
        wholes = {p: self._like.new_empty(self._layout.parameters[p].numel) for p in self.mine}
        for rank, part in enumerate(self._exchange(parts, sizes)):
            at = 0
            for p, offset, length in self._of(rank, self._rank):
                wholes[p][offset : offset + length] = part[at : at + length]
                at += length
        return {p: t.view(self._layout.parameters[p].shape) for p, t in wholes.items()}

    def scatter(self, wholes: Mapping[int, Tensor]) -> list[Tensor]:
        flats = {p: t.reshape(-1) for p, t in wholes.items()}
        parts = [[flats[p][o : o + n] for p, o, n in self._of(rank, self._rank)] for rank in range(self._size)]
        sizes = [sum(n for _, _, n in self._of(self._rank, owner)) for owner in range(self._size)]
        own: dict[Run, Tensor] = {}
        for owner, part in enumerate(self._exchange(parts, sizes)):
            at = 0
            for run in self._of(self._rank, owner):
                own[run] = part[at : at + run[2]]
                at += run[2]
        return [own[run] for run in self._runs[self._rank]]


class Replicated(Dealing):
    """Every rank holds all: it takes its own without asking, and one all-gather brings back what all have made."""

    def __init__(
        self, layout: Layout, parameters: Sequence[int], group: dist.ProcessGroup | None, like: Tensor
    ) -> None:
        self._layout, self._group, self._parameters, self._like = layout, group, tuple(parameters), like
        self._rank, self._size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        owners = deal([cost(layout.parameters[p].shape) for p in parameters], self._size)
        self._of = [tuple(p for p, o in zip(parameters, owners, strict=True) if o == r) for r in range(self._size)]
        self.mine = self._of[self._rank]

    def gather(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        held = dict(zip(self._held(), pieces, strict=True))
        return {p: held[p].to(self._like).view(self._layout.parameters[p].shape) for p in self.mine}

    def _held(self) -> list[int]:
        """The dealt parameters in the order of the pieces; each is one piece here."""
        dealt = set(self._parameters)
        return [piece.parameter for piece in self._layout.pieces if piece.parameter in dealt]

    def scatter(self, wholes: Mapping[int, Tensor]) -> list[Tensor]:
        if self._size == 1:
            return [wholes[p].reshape(-1) for p in self._held()]
        assert self._group is not None
        numels = [[self._layout.parameters[p].numel for p in own] for own in self._of]
        mine = self._like.new_zeros(max(sum(own) for own in numels))
        at = 0
        for p in self.mine:
            mine[at : at + wholes[p].numel()] = wholes[p].reshape(-1)
            at += wholes[p].numel()
        everyones = mine.new_empty(self._size * mine.numel())
        dist.all_gather_into_tensor(everyones.view(torch.uint8), mine.view(torch.uint8), group=self._group)
        out: dict[int, Tensor] = {}
        for own, sizes, part in zip(self._of, numels, everyones.view(self._size, -1), strict=True):
            out |= dict(zip(own, part[: sum(sizes)].split(sizes), strict=True))
        return [out[p] for p in self._held()]
