"""The mirror: each version of a rank's state also lies on other nodes, sent while the next step computes.

Rank r sends to ranks of the next nodes of the ring (its mirrors) and receives for those whose mirror it is (its
mirrored peers). Chunks that enough nodes hold by themselves are not sent: under DDP that is all but the random states
and the numbers, under HSDP whatever the other replica has.

[Note: who touches what] `push` hands a version to the one background thread, which alone uses the mirror's group: it
posts receives into buffers that nobody else knows, sends slices of the version's own buffer, and waits (without the
interpreter's lock). A version's buffer is read until `in_flight` is 0 again, and only then used for another step. A
mirrored peer's version appears in `_mirrored_peers`, under the lock, when its last byte is there, so a reader sees
whole versions only. An error ends the thread's use of the group for good; it is kept, and raised at the next `push` or
`wait`. `close` gives a transfer under way CLOSE_S, then severs the sockets: a peer that is alive but has closed its own
mirror would otherwise be waited for until the group's timeout. A thread that even that does not free is left alone; see
exchange.py [Note: a message that was half read].
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.checkpoint.safetensors_file import ALIGNMENT
from elastic_lsopt.elastic.memory.exchange import LOOK_S, Cut, never
from elastic_lsopt.elastic.memory.versions import METADATA, Chunk, Index, Version
from elastic_lsopt.errors import PeerFailed

MESSAGE_BYTES = 4 * 2**20
"""Of one message: of 16 MB they cost a fifth more of the processors' time over a local socket (measured)."""
CLOSE_S = 0.1
Routes = dict[tuple[int, int], list[Chunk]]
"""(source rank, target rank) -> the chunks that it sends it."""


def mirrors_of(rank: int, nodes: Sequence[str], copies: int) -> list[int]:
    """The ranks that mirror `rank`: on each of the next nodes of the ring, the one of the same place on its node.

    So a node's shards are spread over all ranks of the next one; where that has fewer, each takes several. With one
    node only: the next ranks of that node. Fewer than `copies` where there are not so many.
    """
    world = len(nodes)
    following = [(rank + i) % world for i in range(1, world)]
    if len(set(nodes)) == 1:
        return following[:copies]
    place = [r for r in range(world) if nodes[r] == nodes[rank]].index(rank)
    out = []
    for node in [n for n in dict.fromkeys(nodes[r] for r in following) if n != nodes[rank]][:copies]:
        there = [r for r in range(world) if nodes[r] == node]
        out.append(there[place % len(there)])
    return out


def routes(chunks: Sequence[Sequence[Chunk]], nodes: Sequence[str], copies: int) -> Routes:
    """Who sends which chunk to whom, from the chunks that each rank holds: pure, the same on all ranks.

    Afterwards each chunk is on `copies` + 1 nodes (ranks, where there is one node), or on all if they are fewer. A
    chunk that several ranks hold is sent by the first of them.
    """
    places = [f"{node}/{r}" for r, node in enumerate(nodes)] if len(set(nodes)) == 1 else list(nodes)
    holders: dict[Chunk, list[int]] = {}
    for rank, own in enumerate(chunks):
        for chunk in own:
            holders.setdefault(chunk, []).append(rank)
    out: Routes = {}
    for chunk, ranks in holders.items():
        have = {places[r] for r in ranks}
        others = [m for m in mirrors_of(ranks[0], nodes, len(nodes)) if places[m] not in have]
        for mirror in others[: max(0, copies + 1 - len(have))]:
            out.setdefault((ranks[0], mirror), []).append(chunk)
    return _with_facts(out, chunks)


def hand_over_routes(chunks: Sequence[Sequence[Chunk]], mirrored: Routes, leaving: Sequence[int]) -> Routes:
    """What leavers send so that no chunk is on leavers only, mirrors counted: to the stayer with least to receive."""
    stayers = [r for r in range(len(chunks)) if r not in leaving]
    safe = {chunk for rank in stayers for chunk in chunks[rank]}
    safe |= {chunk for (_, target), sent in mirrored.items() if target in stayers for chunk in sent}
    out: Routes = {}
    load = dict.fromkeys(stayers, 0)
    for rank in sorted(leaving):
        lost = [chunk for chunk in chunks[rank] if chunk not in safe]
        safe |= set(lost)
        if lost:
            target = min(stayers, key=lambda r: load[r])
            load[target] += sum(length for _, _, length in lost)
            out[rank, target] = lost
    return _with_facts(out, chunks)


def _with_facts(out: Routes, chunks: Sequence[Sequence[Chunk]]) -> Routes:
    """Whoever gets any of a version gets what is no tensor in it too: without it nobody can go on from there."""
    for (source, _), sent in out.items():
        sent += [chunk for chunk in chunks[source] if chunk[0].startswith(METADATA) and chunk not in sent]
    return out


@dataclass(frozen=True)
class Lane:
    """One source's chunks for one target, as one end sees them: its index, and byte ranges of its buffer in order."""

    source: int
    target: int
    index: Index
    spans: tuple[tuple[int, int], ...]


def lanes(by: Routes, indexes: Sequence[Index], rank: int) -> list[Lane]:
    """This rank's ends of the routes. Chunks that are neighbours at the source travel together, at most MESSAGE_BYTES.

    The target's buffer holds only what it gets, so that its ranges are elsewhere but of the same lengths.
    """
    out = []
    for (source, target), chunks in by.items():
        if rank not in (source, target):
            continue
        there = indexes[source]
        here = there if rank == source else there.restricted(chunks)
        runs: list[tuple[Chunk, int, int]] = []
        for chunk in chunks:
            begin, end = there.span(chunk)
            if runs and begin - runs[-1][2] < ALIGNMENT:
                runs[-1] = runs[-1][0], runs[-1][1], end
            else:
                runs.append((chunk, begin, end))
        at_ours = [(here.chunks[first], here.chunks[first] + end - begin) for first, begin, end in runs]
        cut = [(at, min(at + MESSAGE_BYTES, end)) for b, end in at_ours for at in range(b, end, MESSAGE_BYTES)]
        out.append(Lane(source, target, here, tuple(cut)))
    return out


@dataclass(frozen=True)
class _Plan:
    """What the ranks hold and who sends what, from one exchange of all ranks' indexes."""

    indexes: list[Index]
    routes: Routes
    lanes: list[Lane]
    whole: dict[str, int]


class Mirror:
    """The mirror of one generation (collective to make; `group` is a gloo group of all ranks, made for it alone).

    `nodes` names each rank's node; `copies` is how many other nodes hold a version (>= 1); after `cut` nobody waits any
    more. Memory: a buffer of each mirrored peer's size for each version from the committed one on.
    """

    def __init__(
        self, group: dist.ProcessGroup, rank: int, world: int, nodes: Sequence[str], copies: int = 1,
        cut: Cut = never,
    ) -> None:  # fmt: skip
        self._group, self.rank, self.world, self.nodes, self.copies = group, rank, world, tuple(nodes), copies
        self._cut = cut
        self._transport = Transport()
        self._plan: _Plan | None = None
        self._sent_index: Index | None = None
        self._lock = threading.Condition()
        self._mirrored_peers: list[Version] = []
        self._free: list[Tensor] = []
        self._error: Exception | None = None
        self._acknowledged = -1
        self._handed = 0
        self._closing = False
        self.sent_bytes = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    @property
    def survives_node_loss(self) -> bool:
        """Whether a copy lies on another node; with one node it lies in another process only."""
        return len(set(self.nodes)) > 1

    @property
    def ward_bytes(self) -> int:
        """What one version of all mirrored peers takes here; 0 before the first was agreed on."""
        return sum(lane.index.bytes for lane in self._plan.lanes if lane.target == self.rank) if self._plan else 0

    @property
    def acknowledged(self) -> int:
        """The newest step whose versions, own and mirrored peers', are complete; -1 before the first. Never raises."""
        return self._acknowledged

    def push(self, version: Version) -> None:
        """Begin to mirror a version; returns at once. All ranks push the same steps in the same order.

        Raises PeerFailed for an error of an earlier transfer.
        """
        self._refuse_broken()
        version.in_flight += 1
        self._work.put(lambda: self._mirror(version))

    def wait(self, step: int, *, timeout_s: float) -> None:
        """Until `acknowledged` >= `step`. Raises PeerFailed for an error, after the cut, or after `timeout_s`."""
        self._until(lambda: self._acknowledged >= step, f"the mirror of step {step}", timeout_s)

    def commit(self, step: int) -> None:
        """Mirrored peers' versions before `step` are needed no more; their buffers are used again."""
        with self._lock:
            past = [v for v in self._mirrored_peers if v.step < step]
            self._mirrored_peers = [v for v in self._mirrored_peers if v.step >= step]
            self._free = [*self._free, *(v.buffer for v in past)][: 2 * len(self._sources())]

    def hand_over(self, version: Version, leaving: Sequence[int], *, timeout_s: float = 60.0) -> None:
        """Before ranks leave as planned (collective): what only leavers hold goes to stayers, and nothing else.

        `version` was pushed last. Returns when this rank's part has arrived. Raises PeerFailed.
        """
        self.wait(version.step, timeout_s=timeout_s)
        before = self._handed
        version.in_flight += 1
        self._work.put(lambda: self._hand_over(version, list(leaving)))
        self._until(lambda: self._handed > before, "the hand-over", timeout_s)

    def close(self) -> list[Version]:
        """End the thread, also when peers are dead or silent; the mirrored peers' versions that are complete. See the
        note."""
        self._closing = True
        self._work.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            with suppress(RuntimeError, OSError, ValueError):
                self._transport.sever()
            self._thread.join(CLOSE_S)
        with self._lock:
            return list(self._mirrored_peers)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (act := self._work.get()) is not None and not self._closing:
            try:
                act()
            except Exception as error:
                with self._lock:
                    self._error = error
                    self._lock.notify_all()
                return

    def _mirror(self, version: Version) -> None:
        plan = self._agree(version)
        version.whole = plan.whole
        self._transfer(version, plan.lanes)
        version.in_flight -= 1
        with self._lock:
            self._acknowledged = version.step
            self._lock.notify_all()

    def _hand_over(self, version: Version, leaving: list[int]) -> None:
        plan = self._agree(version)
        by = hand_over_routes([list(index.chunks) for index in plan.indexes], plan.routes, leaving)
        self._transfer(version, lanes(by, plan.indexes, self.rank))
        version.in_flight -= 1
        with self._lock:
            self._handed += 1
            self._lock.notify_all()

    def _agree(self, version: Version) -> _Plan:
        """The plan, made again where any rank's index is new; all ranks see the same step."""
        fresh = version.index is not self._sent_index
        head = torch.tensor([fresh, version.step, -version.step])
        self._group.allreduce([head], dist.ReduceOp.MAX).wait()
        anyone, newest, oldest = head.tolist()
        if newest != -oldest:
            raise RuntimeError(f"ranks push different steps: {-oldest} and {newest}")
        if anyone or self._plan is None:
            indexes = [Index.from_json(index) for index in gather_json(self._group, version.index.to_json())]
            chunks = [list(index.chunks) for index in indexes]
            whole = {key: numel for index in indexes for key, numel in index.numels.items()}
            by = routes(chunks, self.nodes, self.copies)
            self._plan = _Plan(indexes, by, lanes(by, indexes, self.rank), whole)
            self._sent_index = version.index
        return self._plan

    def _transfer(self, version: Version, own: Sequence[Lane]) -> None:
        """Send what others want of `version`, receive what this rank is to hold; every mirrored peer that arrives is
        kept."""
        assert self._plan is not None
        arriving: list[tuple[Version, list[Any]]] = []
        sending: list[Any] = []
        for lane in own:
            if lane.target == self.rank:
                mirrored_peer = Version(
                    version.generation, version.step, lane.source, self.world, self.nodes[lane.source], lane.index,
                    self._buffer(lane.index.bytes), self._plan.whole,
                )  # fmt: skip
                works = [self._group.recv([mirrored_peer.buffer[b:e]], lane.source, 0) for b, e in lane.spans]
                arriving.append((mirrored_peer, works))
            else:
                sending += [self._group.send([version.filled()[b:e]], lane.target, 0) for b, e in lane.spans]
                self.sent_bytes += sum(e - b for b, e in lane.spans)
        broken: Exception | None = None
        for mirrored_peer, works in arriving:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:  # another mirrored peer's may still arrive
                broken = error
                continue
            with self._lock:
                self._mirrored_peers.append(mirrored_peer)
        for work in sending:
            work.wait()
        if broken is not None:
            raise broken

    def _buffer(self, size: int) -> Tensor:
        with self._lock:
            fitting = next((i for i, b in enumerate(self._free) if b.numel() == size), None)
            if fitting is not None:
                return self._free.pop(fitting)
        return torch.empty(size, dtype=torch.uint8)

    # -- waiting -----------------------------------------------------------------------------------------------

    def _sources(self) -> list[int]:
        return [lane.source for lane in self._plan.lanes if lane.target == self.rank] if self._plan else []

    def _until(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        with self._lock:
            while not done():
                self._refuse_broken()
                if self._cut():
                    raise PeerFailed(f"{what} will not come: a peer died.")
                if time.monotonic() >= end:
                    raise PeerFailed(f"{what} has not arrived within {timeout_s} s.")
                self._lock.wait(LOOK_S)

    def _refuse_broken(self) -> None:
        if self._error is not None:
            raise PeerFailed(f"the mirror lost a peer: {' '.join(str(self._error).split())[:300]}") from self._error
