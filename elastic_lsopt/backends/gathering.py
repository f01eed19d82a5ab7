"""Whole parameters from their pieces, and sums of whole tensors cut back into pieces, for any layout.

    whole(pieces, wanted)      each wanted parameter, complete on every rank (AllGather over the shard group)
    cut(wholes, wanted)        this rank's pieces of the sum over the shard group (ReduceScatter)
    sum_holders(pieces)       their sum over the ranks that hold the same pieces

`whole` and `cut` are each other's transpose, so a product with a sharded vector is: whole, any local linear map, cut,
and the replicas' sum once at the end: replicas may take different ways through a model until then.

A large parameter whose equal parts lie in the order of the ranks (FSDP2, ZeRO-3) is gathered by itself, straight into
its place. The others travel together, through a padded buffer. Where one rank holds most of them (the flat partitions
of ZeRO-1 and 2, which cut where they must), padding would cost more than it saves: they are summed into place instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.space.layout import Layout

LARGE = 1 << 18
"""Elements from which a parameter travels by itself (1 MiB in fp32): then latency does not count and a copy does."""


@dataclass(frozen=True)
class Run:
    """Elements [offset, offset + length) of a parameter, at `start` of its rank's part of the buffer."""

    parameter: int
    offset: int
    length: int
    start: int


@dataclass(frozen=True)
class Batch:
    """Parameters that travel together: each rank's runs, `longest` of which any rank's sum is."""

    parameters: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    longest: int
    in_place: bool
    """One parameter whose equal parts, one a rank, make it up in order: its buffer is itself (and padding)."""


class Gathering:
    """The way between pieces and whole parameters of one layout (collective to make: three numbers a piece).

    `shards` is the group that together holds the vector once, `holders` the group of those that hold equal pieces;
    None: this rank alone.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        shards: dist.ProcessGroup | None,
        holders: dist.ProcessGroup | None,
    ) -> None:
        self.layout, self.device = layout, device
        self._shards = shards if shards is not None and dist.get_world_size(shards) > 1 else None
        self._holders = holders if holders is not None and dist.get_world_size(holders) > 1 else None
        self._rank = dist.get_rank(self._shards) if self._shards is not None else 0
        self.everyones = self._gather_pieces()
        self._batches: dict[tuple[int, ...], list[Batch]] = {}

    def _gather_pieces(self) -> list[list[tuple[int, int, int]]]:
        mine = [(p.parameter, p.offset, p.length) for p in self.layout.pieces]
        if self._shards is None:
            return [mine]
        world = dist.get_world_size(self._shards)
        counts = torch.zeros(world, dtype=torch.int64, device=self.device)
        counts[self._rank] = len(mine)
        dist.all_reduce(counts, group=self._shards)
        table = torch.zeros(world, max(int(counts.max()), 1), 3, dtype=torch.int64, device=self.device)
        if mine:
            table[self._rank, : len(mine)] = torch.tensor(mine, dtype=torch.int64)
        dist.all_reduce(table, group=self._shards)
        return [
            [(p, o, n) for p, o, n in rows[:count]] for rows, count in zip(table.tolist(), counts.tolist(), strict=True)
        ]

    # -- what travels together ---------------------------------------------------------------------------------

    @cached_property
    def everything(self) -> tuple[int, ...]:
        """The numbers of all parameters."""
        return tuple(range(len(self.layout.parameters)))

    def own(self, wanted: Sequence[int]) -> list[int]:
        """The places, in `layout.pieces`, of this rank's pieces of these parameters."""
        chosen = set(wanted)
        return [i for i, piece in enumerate(self.layout.pieces) if piece.parameter in chosen]

    def _plan(self, wanted: tuple[int, ...]) -> list[Batch]:
        if wanted not in self._batches:
            single = [self._batch((p,)) for p in wanted if self.layout.parameters[p].numel >= LARGE]
            alone = [batch for batch in single if batch.in_place]
            taken = {p for batch in alone for p in batch.parameters}
            rest = tuple(p for p in wanted if p not in taken)
            self._batches[wanted] = [*alone, *([self._batch(rest)] if rest else [])]
        return self._batches[wanted]

    def _batch(self, parameters: tuple[int, ...]) -> Batch:
        chosen = set(parameters)
        runs, lengths = [], []
        for pieces in self.everyones:
            at, own = 0, []
            for parameter, offset, length in pieces:
                if parameter in chosen:
                    own.append(Run(parameter, offset, length, at))
                    at += length
            runs.append(tuple(own))
            lengths.append(at)
        longest = max(lengths)
        in_place = len(parameters) == 1 and all(
            not own or (len(own) == 1 and own[0].offset == rank * longest) for rank, own in enumerate(runs)
        )
        return Batch(parameters, tuple(runs), longest, in_place)

    def _pads_too_much(self, batch: Batch) -> bool:
        return batch.longest * len(batch.runs) > 2 * sum(self.layout.parameters[p].numel for p in batch.parameters)

    # -- there and back ----------------------------------------------------------------------------------------

    def all_gather(self, pieces: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Each wanted parameter in its full shape, from this rank's 1-D `pieces` of them (in the layout's order).

        Collective over the shard group. Without one the results are views of the pieces, and cost nothing.
        """
        wanted = tuple(wanted)
        shapes = [self.layout.parameters[p].shape for p in wanted]
        mine = dict(zip(self.own(wanted), pieces, strict=True))
        out: dict[int, Tensor] = {}
        if self._shards is None:
            # A parameter without elements has no piece.
            out = {p: torch.zeros(0, dtype=dtype, device=self.device) for p in wanted}
            out |= {self.layout.pieces[i].parameter: t for i, t in mine.items()}
            return [out[p].view(shape) for p, shape in zip(wanted, shapes, strict=True)]
        for batch in self._plan(wanted):
            out.update(self._whole(batch, [mine[i] for i in self.own(batch.parameters)], dtype))
        return [out[p].view(shape) for p, shape in zip(wanted, shapes, strict=True)]

    def _whole(self, batch: Batch, mine: Sequence[Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        sizes = {p: self.layout.parameters[p].numel for p in batch.parameters}
        if self._pads_too_much(batch):
            full = self._flat(batch, dtype)
            for run, t in zip(batch.runs[self._rank], mine, strict=True):
                full[run.parameter][run.offset : run.offset + run.length] = t
            for t in full.values():
                dist.all_reduce(t, group=self._shards)
            return full
        send = torch.zeros(batch.longest, dtype=dtype, device=self.device)
        for run, t in zip(batch.runs[self._rank], mine, strict=True):
            send[run.start : run.start + run.length] = t
        received = torch.empty(len(batch.runs) * batch.longest, dtype=dtype, device=self.device)
        dist.all_gather_into_tensor(received, send, group=self._shards)
        if batch.in_place:
            [parameter] = batch.parameters
            return {parameter: received[: sizes[parameter]]}
        full = self._flat(batch, dtype)
        for own, part in zip(batch.runs, received.view(len(batch.runs), -1), strict=True):
            for run in own:
                full[run.parameter][run.offset : run.offset + run.length] = part[run.start : run.start + run.length]
        return full

    def _flat(self, batch: Batch, dtype: torch.dtype) -> dict[int, Tensor]:
        return {
            p: torch.zeros(self.layout.parameters[p].numel, dtype=dtype, device=self.device) for p in batch.parameters
        }

    def reduce_scatter(
        self, wholes: Sequence[Tensor | None], wanted: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """This rank's 1-D pieces of the sum of `wholes` over the shard group; None stands for zeros (collective).

        Writes into none of them: autograd may hand out the
        same tensor as a gradient and keep it for another product.
        """
        wanted = tuple(wanted)
        given = {
            p: torch.zeros(self.layout.parameters[p].numel, dtype=dtype, device=self.device)
            if t is None
            else t.reshape(-1)
            for p, t in zip(wanted, wholes, strict=True)
        }
        if self._shards is None:
            return [given[self.layout.pieces[i].parameter] for i in self.own(wanted)]
        cut = {}
        for batch in self._plan(wanted):
            cut.update(zip(self.own(batch.parameters), self._cut(batch, given, dtype), strict=True))
        return [cut[i] for i in self.own(wanted)]

    def _cut(self, batch: Batch, given: dict[int, Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = batch.runs[self._rank]
        if self._pads_too_much(batch):
            for p in batch.parameters:
                given[p] = given[p].clone()
                dist.all_reduce(given[p], group=self._shards)
            return [given[run.parameter][run.offset : run.offset + run.length].clone() for run in own]
        send = torch.zeros(len(batch.runs), batch.longest, dtype=dtype, device=self.device)
        for part, runs in zip(send, batch.runs, strict=True):
            for run in runs:
                part[run.start : run.start + run.length] = given[run.parameter][run.offset : run.offset + run.length]
        received = torch.empty(batch.longest, dtype=dtype, device=self.device)
        dist.reduce_scatter_tensor(received, send.view(-1), group=self._shards)
        return [received[run.start : run.start + run.length] for run in own]

    def sum_holders(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """The pieces' sums over the ranks that hold the same ones (collective); small pieces travel together."""
        if self._holders is None:
            return pieces
        small = [t for t in pieces if t.numel() < LARGE]
        together = torch.cat(small) if small else torch.empty(0, device=self.device)
        if small:
            dist.all_reduce(together, group=self._holders)
        parts = iter(together.split([t.numel() for t in small]))
        out = []
        for t in pieces:
            if t.numel() < LARGE:
                out.append(next(parts))
                continue
            out.append(t.clone())
            dist.all_reduce(out[-1], group=self._holders)
        return out
