"""The way from a rank to those who hold the same elements in the other replicas: bundles, and a group for each.

[Note: raw groups] A group of peers is made directly on gloo: it is no group of torch's registry, so no framework can
take it for its own, only its members need to call, and each operation has a time limit of its own. Where a peer dies
the kernel closes its connections, and the operation raises within milliseconds; where it is silent, at the limit. A
group in which an operation has failed is dropped by all its members and never used again: they may have begun other
operations in it.

[Note: a sum in two halves] Row k of a bundle goes to peer k (an all-to-all), who adds up what all have sent, and sends
the sum to all (an all-gather): an all-reduce by hand, with its bytes. Between the halves each peer holds its part of
everybody's vector, so that inner products between replicas cost nothing more; each half may travel in few bits; and all
members decode the same bytes, so they end with the same bits.

[Note: who does not hear] A death closes the connections to the dead. A member that has what it wanted of the dead, and
waits for another, does not feel it; and where the other gives up, gloo does not always close what lies half sent. So
whoever waits for long asks now and then whether the meeting has failed, as those say who have heard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions
from torch.nn.functional import pad

from elastic_lsopt.backends.groups import gloo
from elastic_lsopt.backends.peers.formats import Format
from elastic_lsopt.backends.peers.intervals import Bundle, Seat
from elastic_lsopt.errors import PeerFailed
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

ASK_EVERY = timedelta(seconds=0.03)
PIECE = 2**15
"""Of so many numbers of each replica inner products are taken at a time."""


@dataclass(frozen=True)
class Sum:
    """The sum of a part, and what rounding has kept back of this rank's own (None: nothing)."""

    value: Tensor
    left: Tensor | None


class Peers:
    """Groups of one rank with its peers, bundle by bundle (collective among the members to make).

    `store` is one that no other group has used; `sent_bytes` counts what this rank has sent.
    """

    def __init__(
        self, own: Seat, members: Sequence[int], bundles: Sequence[Bundle], store: dist.Store, timeout: timedelta
    ) -> None:
        self.bundles, self.members = tuple(bundles), tuple(members)
        self.sent_bytes = 0
        self._timeout, self._over = timeout, lambda: False
        self._places = [bundle.holders.index(own) for bundle in self.bundles]
        self._groups = [self._group(b.holders, own, f"{b.copies}", store) for b in self.bundles]
        replica, rank = own
        firsts = [(member, 0) for member in self.members]
        self._firsts = self._group(firsts, (replica, 0), "first", store) if rank == 0 else None

    def _group(self, holders: Sequence[Seat], own: Seat, kind: str, store: dist.Store) -> dist.ProcessGroup:
        name = "-".join([kind, *(f"{replica}.{rank}" for replica, rank in holders)])
        with told():
            return gloo(dist.PrefixStore(name, store), holders.index(own), len(holders), self._timeout)

    def close(self) -> None:
        """Close the connections, so that whoever waits for this rank in one of the groups hears at once.

        Each in a thread of its own: gloo takes some 20 ms to end a group's threads.
        """
        doomed = [*self._groups, self._firsts]
        self._groups, self._firsts = [], None
        while doomed:  # whoever lets go of a group last is the one who waits
            last = [doomed.pop()]
            threading.Thread(target=last.clear, name="closing").start()

    def limit(self, timeout: timedelta, over: Callable[[], bool]) -> None:
        """How long an operation may take from now on, and whether nobody need wait for it any more."""
        self._timeout, self._over = timeout, over

    def _heard(self, work: dist.Work) -> None:
        """Wait for an operation. See [Note: who does not hear]."""
        with told():
            while not work.is_completed():
                with suppress(RuntimeError):
                    work.wait(ASK_EVERY)
                if not work.is_completed() and self._over():
                    raise PeerFailed("a replica is gone, as another has found")
            work.wait()

    def numbers(self, own: Tensor) -> Tensor:
        """What the first rank of each member says, a row each; of another rank zeros."""
        rows = own.new_zeros(len(self.members), own.numel())
        if self._firsts is not None:
            options = AllgatherOptions()
            options.timeout = self._timeout
            self._heard(self._firsts._allgather_base(rows, own.reshape(1, -1), options))
        return rows

    def total(self, own: Tensor) -> Tensor:
        """The sum of what the first rank of each member says; of another rank zeros."""
        total = own.clone() if self._firsts is not None else torch.zeros_like(own)
        if self._firsts is not None:
            options = dist.AllreduceOptions()
            options.timeout = self._timeout
            self._heard(self._firsts.allreduce([total], options))
        return total

    def watch(self, timeout: timedelta) -> Callable[[], bool]:
        """From when on a member's first rank is gone (of the first ranks, on all that live; nobody waits).

        A gather that ends when all have begun it, and fails when a connection is closed: by a death, or by a member
        that has dropped its groups.
        """
        assert self._firsts is not None
        options = AllgatherOptions()
        options.timeout = timeout
        with suppress(RuntimeError):
            own = torch.zeros(1, 1)
            work = self._firsts._allgather_base(own.new_empty(len(self.members), 1), own, options)
            return lambda: work.is_completed() and _failed(work)
        return lambda: True

    def packed(self, vector: Vector) -> list[Tensor]:
        """What goes into each bundle, one tensor each, on the host."""
        tensors = vector.tensors
        return [
            torch.cat([tensors[s.piece][s.begin : s.end] for s in bundle.stretches]).cpu() for bundle in self.bundles
        ]

    def unpacked(self, parts: Sequence[Tensor], space: ParameterSpace) -> Vector:
        """The Vector of which `packed` is this."""
        out = space.empty()
        for bundle, part in zip(self.bundles, parts, strict=True):
            at = 0
            for s in bundle.stretches:
                out.tensors[s.piece][s.begin : s.end].copy_(part[at : at + s.end - s.begin])
                at += s.end - s.begin
        return out

    # -- collectives -------------------------------------------------------------------------------------------

    def sums(self, parts: Sequence[Tensor], form: Format, *, shares: Tensor | None = None) -> tuple[list[Sum], Tensor]:
        """The sum over the peers of each part, and this rank's share of the inner products between replicas.

        Inner products are of the peers' parts over their `shares`, less their mean: a number for each member, (M, 1),
        or for each of its pieces, (M, pieces). None: of the parts as they are told (zero in a sparse format). Raises
        PeerFailed where a peer is gone.
        """
        out = []
        inner = torch.zeros(len(self.members), len(self.members), dtype=torch.float64)
        for number, part in enumerate(parts):
            out.append(self._sum(number, part, form, shares, inner))
        return out, inner

    def _sum(self, number: int, part: Tensor, form: Format, shares: Tensor | None, inner: Tensor) -> Sum:
        size, n = len(self.bundles[number].holders), part.numel()
        at = self._places[number]
        if form.sparse:
            return self._sparse_sum(number, part, form)
        rows = pad(part, (0, -n % (size * form.step))).view(size, -1)
        told = form.encode(rows)
        everyones = form.decode(self._to_each(number, told), part.dtype)
        own = everyones.sum(0) if form.exact else everyones.sum(0, dtype=torch.float64).to(part.dtype)
        width = rows.shape[1]
        of_each = None if shares is None else self._of_elements(number, shares, at * width, width)
        inner += products(everyones, of_each) / self.bundles[number].copies
        spread = form.encode(own[None])
        whole = form.decode(self._to_all(number, spread), part.dtype).reshape(-1)[:n]
        left: Tensor | None = None
        if not form.exact:
            lost = rows - form.decode(told, part.dtype)
            lost[at] += own - form.decode(spread, part.dtype)[0]
            left = lost.view(-1)[:n]
        return Sum(whole, left)

    def _of_elements(self, number: int, shares: Tensor, begin: int, count: int) -> Tensor:
        """Of so many elements of a bundle, each member's share; behind the bundle's end, where all tell zeros, 1."""
        if shares.shape[1] == 1:
            return shares
        stretches, at = self.bundles[number].stretches, -begin
        lengths = []
        for s in stretches:
            end = at + s.end - s.begin
            lengths.append(max(0, min(end, count) - max(at, 0)))
            at = end
        columns = torch.cat(
            [shares[:, [s.piece for s in stretches]], torch.ones(len(shares), 1, dtype=shares.dtype)], 1
        )
        return columns.repeat_interleave(torch.tensor([*lengths, count - sum(lengths)]), dim=1)

    def _sparse_sum(self, number: int, part: Tensor, form: Format) -> Sum:
        """Everybody's numbers to all, who add them up in the same order."""
        n = part.numel()
        row = pad(part, (0, -n % form.step))[None]
        told = form.encode(row)
        whole = form.decode(self._to_all(number, told), part.dtype).sum(0)[:n]
        return Sum(whole, (row - form.decode(told, part.dtype))[0, :n])

    def from_leader(self, parts: Sequence[Tensor], place: int) -> list[Tensor]:
        """The parts of the member at that place, on all."""
        out = []
        for number, part in enumerate(parts):
            values = part.clone()
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor, options.timeout = place, 0, self._timeout
            size = len(self.bundles[number].holders)
            self.sent_bytes += (size - 1) * values.nbytes if self._places[number] == place else 0
            self._heard(self._groups[number].broadcast([values], options))
            out.append(values)
        return out

    def handed_on(self, parts: Sequence[Tensor], place: int, others: Sequence[int]) -> list[Tensor]:
        """The parts of the member at that place, at those others: messages from one to one."""
        out = []
        for number, part in enumerate(parts):
            group, values = self._groups[number], part.clone()
            with told():
                if self._places[number] == place:
                    self.sent_bytes += part.nbytes * len(others)
                    works = [group.send([values], other, 0) for other in others]
                else:
                    works = [group.recv([values], place, 0)]
                for work in works:
                    work.wait(self._timeout)
            out.append(values)
        return out

    def swapped(self, parts: Sequence[Tensor], places: Sequence[int]) -> list[list[Tensor]]:
        """The parts of the members at those places, who get this one's: a list for each of them."""
        received = [[torch.empty_like(part) for part in parts] for _ in places]
        for number, part in enumerate(parts):
            works = []
            with told():
                for i, place in enumerate(places):
                    works.append(self._groups[number].send([part], place, 0))
                    works.append(self._groups[number].recv([received[i][number]], place, 0))
                    self.sent_bytes += part.nbytes
                for work in works:
                    work.wait(self._timeout)
        return received

    def _to_each(self, number: int, rows: Tensor) -> Tensor:
        """Row k to peer k; what each peer has sent here."""
        if len(rows) == 1:
            return rows
        out, options = torch.empty_like(rows), dist.AllToAllOptions()
        options.timeout = self._timeout
        self.sent_bytes += rows[0].nbytes * (len(rows) - 1)
        self._heard(self._groups[number].alltoall_base(out, rows.contiguous(), [], [], options))
        return out

    def _to_all(self, number: int, row: Tensor) -> Tensor:
        """Everybody's row, in order."""
        size = len(self.bundles[number].holders)
        if size == 1:
            return row
        out, options = row.new_empty(size, row.shape[1]), AllgatherOptions()
        options.timeout = self._timeout
        self.sent_bytes += row.nbytes * (size - 1)
        self._heard(self._groups[number]._allgather_base(out, row.contiguous(), options))
        return out


def _failed(work: dist.Work) -> bool:
    try:
        work.wait()
    except RuntimeError:
        return True
    return False


def products(told: Tensor, shares: Tensor | None) -> Tensor:
    """Inner products of the rows over their shares (of a row, or of each number), less their mean; None: of the rows
    as they are. In fp64, a piece at a time that the cache holds."""
    out = told.new_zeros(len(told), len(told), dtype=torch.float64)
    for begin in range(0, told.shape[1], PIECE):
        points = told[:, begin : begin + PIECE].double()
        if shares is not None:
            points = points / (shares if shares.shape[1] == 1 else shares[:, begin : begin + PIECE])
            points.sub_(points.mean(0))
        out += points @ points.T
    return out


@contextmanager
def told() -> Iterator[None]:
    """What gloo raises, as PeerFailed."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerFailed):
            raise
        raise PeerFailed(f"a replica is gone: {str(error).splitlines()[0][:200]}") from error
