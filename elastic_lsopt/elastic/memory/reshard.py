"""From what the living hold to what the new layout wants: choose S*, plan the transfers, move only what is missing.

    found = gather_json(group, inventory(versions))       # what every rank of the new group holds
    chosen = choose(found)                                # S*: the newest moment of which nothing is lost, or None
    reshard(engine, versions, chosen, found, group)       # weights, base and method state, random states, clock

[Note: why nobody waits in a circle] All ranks work out the same list of messages and each does its own part of it in
that order, with at most WINDOW of them under way. The first message of the list that has not ended has both its ends'
attention: everything before it has ended for both. So it ends, and the next is first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.checkpoint.contents import Held, TrainingState, merge_metadata
from elastic_lsopt.checkpoint.restore import restore
from elastic_lsopt.checkpoint.safetensors_file import BY_NAME
from elastic_lsopt.elastic.memory.exchange import Cut, never, wait_for_message
from elastic_lsopt.elastic.memory.versions import METADATA, RANDOM, Chunk, HostVersions, Version, missing
from elastic_lsopt.errors import PeerFailed
from elastic_lsopt.oracle.clock import SampleClock

MESSAGE_BYTES = 16 * 2**20
WINDOW = 4
"""Messages under way at once on a rank: its staging memory is WINDOW * MESSAGE_BYTES at most."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """S*: the moment from which all go on, and what its ranks knew of it beside tensors."""

    generation: int
    step: int
    world: int
    clock: SampleClock
    extra: Json
    """What `take` was given (the lowest rank's)."""


@dataclass(frozen=True)
class Transfer:
    """Elements of one chunk, from the rank that holds them to the one that wants them."""

    source: int
    target: int
    chunk: Chunk


@dataclass(frozen=True)
class Resharded:
    """What was put into the engine, and what it cost this rank."""

    generation: int
    step: int
    extra: Json
    received_bytes: int
    local_bytes: int
    """Taken from this process's own memory."""
    seconds: float


# -- S* --------------------------------------------------------------------------------------------------------------


def inventory(versions: HostVersions) -> Json:
    """What this process holds, as JSON: an entry a version, with its chunks, checksum and bytes."""
    indexes: list[Json] = []
    numbers: dict[int, int] = {}
    entries = []
    for v in versions.summed:
        if id(v.index) not in numbers:
            numbers[id(v.index)] = len(indexes)
            indexes.append({"index": v.index.to_json()["tensors"], "whole": v.whole})
        elif len(v.whole) > len(indexes[numbers[id(v.index)]]["whole"]):
            indexes[numbers[id(v.index)]]["whole"] = v.whole
        metadata = v.metadata
        entries.append(
            {
                "generation": v.generation, "step": v.step, "rank": v.rank, "world": v.world, "node": v.node,
                "bytes": v.index.bytes, "checksum": v.checksum(), "index": numbers[id(v.index)],
                "clock": metadata["clock"], "extra": metadata["extra"],
            }
        )  # fmt: skip
    return {"indexes": indexes, "versions": entries}


def choose(inventories: Sequence[Json]) -> Chosen | None:
    """The newest (generation, step) of which the living hold every element; None where there is none.

    Pure. Versions of two generations are never mixed. Random states may be lost (training does not depend on them).
    Where the copies of one version differ in their checksum, none of them counts.
    """
    found: dict[tuple[int, int], list[tuple[Json, Json]]] = {}
    sums: dict[tuple[int, int, int, str], set[int]] = {}
    for inventory in inventories:
        for entry in inventory["versions"]:
            index = inventory["indexes"][entry["index"]]
            found.setdefault((entry["generation"], entry["step"]), []).append((entry, index))
            sums.setdefault(_copy(entry, index), set()).add(entry["checksum"])
    for stamp in sorted(found, reverse=True):
        sound = [(e, i) for e, i in found[stamp] if len(sums[_copy(e, i)]) == 1]
        if sound and _complete([index for _, index in sound]):
            first = min((entry for entry, _ in sound), key=lambda e: e["rank"])
            return Chosen(*stamp, first["world"], SampleClock(**first["clock"]), first["extra"])
    return None


def _copy(entry: Json, index: Json) -> tuple[int, int, int, str]:
    """What two copies of the same bytes have in common."""
    chunks = sorted((key, offset, length) for key, (_, _, held) in index["index"].items() for offset, length, _ in held)
    return entry["generation"], entry["step"], entry["rank"], str(chunks)


def _complete(indexes: Sequence[Json]) -> bool:
    """Whether the indexes together cover every key that any of them knows of."""
    whole = {key: numel for index in indexes for key, numel in index["whole"].items()}
    held: dict[str, list[tuple[int, int]]] = {}
    for index in indexes:
        for key, (_, _, chunks) in index["index"].items():
            held.setdefault(key, []).extend((offset, offset + length) for offset, length, _ in chunks)
    return all(
        not missing((0, numel), held.get(key, []))
        for key, numel in whole.items()
        if not key.startswith((METADATA, RANDOM))
    )


# -- who sends what --------------------------------------------------------------------------------------------------


def transfers(held: Sequence[Sequence[Chunk]], wanted: Sequence[Sequence[Chunk]]) -> list[Transfer]:
    """For each rank's wanted runs, what it does not hold itself, from the holder that has least to send so far.

    Pure; the same on all ranks. Raises LookupError where nobody holds a wanted element.
    """
    load = [0] * len(held)
    holders: dict[str, list[tuple[int, int, int]]] = {}
    for rank, chunks in enumerate(held):
        for key, offset, length in chunks:
            holders.setdefault(key, []).append((offset, offset + length, rank))
    out = []
    for target, runs in enumerate(wanted):
        for key, offset, length in runs:
            everyones = holders.get(key, [])
            own = [(low, high) for low, high, rank in everyones if rank == target]
            for begin, end in missing((offset, offset + length), own):
                edges = {begin, end, *(x for low, high, _ in everyones for x in (low, high) if begin < x < end)}
                for low, high in pairwise(sorted(edges)):
                    able = {rank for a, b, rank in everyones if a <= low and high <= b}
                    if not able:
                        raise LookupError(f"no rank holds elements [{low}, {high}) of {key}")
                    source = min(able, key=lambda r: (load[r], r))
                    load[source] += high - low
                    out.append(Transfer(source, target, (key, low, high - low)))
    return out


def messages(moves: Sequence[Transfer], element_bytes: dict[str, int]) -> list[list[Transfer]]:
    """The transfers packed, a pair of ranks each, into messages of at most MESSAGE_BYTES, in the order for all."""
    pairs: dict[tuple[int, int], list[list[Transfer]]] = {}
    room: dict[tuple[int, int], int] = {}
    for move in moves:
        pair, (key, offset, length) = (move.source, move.target), move.chunk
        while length:
            if room.get(pair, 0) < element_bytes[key]:
                pairs.setdefault(pair, []).append([])
                room[pair] = MESSAGE_BYTES
            part = min(length, room[pair] // element_bytes[key])
            pairs[pair][-1].append(Transfer(*pair, (key, offset, part)))
            room[pair] -= part * element_bytes[key]
            offset, length = offset + part, length - part
    rounds = max((len(packed) for packed in pairs.values()), default=0)
    return [packed[i] for i in range(rounds) for _, packed in sorted(pairs.items()) if i < len(packed)]


# -- moving ----------------------------------------------------------------------------------------------------------


class Holdings:
    """The chosen moment's bytes, in this process and, by its index, in all of them; what `restore` reads from."""

    def __init__(
        self, versions: HostVersions, chosen: Chosen, inventories: Sequence[Json], group: dist.ProcessGroup, cut: Cut
    ) -> None:
        self._group, self._rank, self._cut = group, group.rank(), cut
        stamp = chosen.generation, chosen.step
        self._mine = [v for v in versions.held if v.stamp == stamp]
        self.everyones: list[list[Chunk]] = []
        self.tensors: dict[str, Json] = {}
        reach: dict[str, list[tuple[int, int]]] = {}
        for found in inventories:
            indexes = [found["indexes"][e["index"]]["index"] for e in found["versions"] if stamp == _stamp(e)]
            chunks = {(key, at, n) for index in indexes for key, (_, _, held) in index.items() for at, n, _ in held}
            self.everyones.append(sorted(chunks))
            for index in indexes:
                for key, (dtype, numel, _) in index.items():
                    self.tensors[key] = {"dtype": dtype, "numel": numel}
        for chunks in self.everyones:
            for key, offset, length in chunks:
                reach.setdefault(key, []).append((offset, offset + length))
        for key in [k for k, t in self.tensors.items() if missing((0, t["numel"]), reach[k])]:
            del self.tensors[key]  # random states of which a part is lost
        metadata = gather_json(group, {str(v.rank): v.metadata for v in self._mine})
        known = {int(rank): told for ranks in metadata for rank, told in ranks.items()}
        self.metadata = merge_metadata([known[rank] for rank in sorted(known)])
        self.received_bytes = self.local_bytes = 0

    def fill(self, wanted: dict[str, Held]) -> None:
        """Bytes into `wanted` of every rank (collective). See [Note: why nobody waits in a circle]."""
        targets = [(key, at, tensor) for key, held in wanted.items() for at, tensor in held.chunks if tensor.numel()]
        for key, at, tensor in targets:
            self._copy_own(key, at, tensor)
        runs = gather_json(self._group, [[key, at, tensor.numel()] for key, at, tensor in targets])
        moves = transfers(self.everyones, [[(k, at, n) for k, at, n in run] for run in runs])
        sizes = {key: BY_NAME[tensor["dtype"]].itemsize for key, tensor in self.tensors.items()}
        under_way: deque[tuple[Any, Tensor, list[Transfer] | None]] = deque()

        def settle() -> None:
            work, buffer, arrived = under_way.popleft()
            wait_for_message(work, self._cut)
            if arrived is not None:
                self._unpack(buffer, arrived, targets)

        for message in messages(moves, sizes):
            source, target = message[0].source, message[0].target
            if self._rank not in (source, target):
                continue
            if len(under_way) == WINDOW:
                settle()
            if self._rank == source:
                buffer = torch.cat([self._read(move.chunk) for move in message])
                under_way.append((self._group.send([buffer], target, 0), buffer, None))
            else:
                buffer = torch.empty(sum(m.chunk[2] * sizes[m.chunk[0]] for m in message), dtype=torch.uint8)
                under_way.append((self._group.recv([buffer], source, 0), buffer, message))
                self.received_bytes += buffer.numel()
        while under_way:
            settle()

    def _copy_own(self, key: str, at: int, tensor: Tensor) -> None:
        """What this process holds of elements [at, at + n) of `key` into `tensor`."""
        end = at + tensor.numel()
        todo = [(at, end)]
        for version, chunk in self._chunks(key):
            low, high = max(at, chunk[1]), min(end, chunk[1] + chunk[2])
            if low < high and any(b < high and low < e for b, e in todo):
                part = version.tensor(chunk)[low - chunk[1] : high - chunk[1]]
                tensor[low - at : high - at].copy_(part)
                self.local_bytes += part.nbytes
                todo = [rest for run in todo for rest in missing(run, [(low, high)])]

    def _read(self, wanted: Chunk) -> Tensor:
        """The bytes of a run that lies within one chunk here."""
        key, offset, length = wanted
        for version, chunk in self._chunks(key):
            if chunk[1] <= offset and offset + length <= chunk[1] + chunk[2]:
                return version.tensor(chunk)[offset - chunk[1] : offset - chunk[1] + length].view(torch.uint8)
        raise LookupError(f"elements [{offset}, {offset + length}) of {key} are not here")

    def _chunks(self, key: str) -> list[tuple[Version, Chunk]]:
        if not hasattr(self, "_by_key"):
            self._by_key: dict[str, list[tuple[Version, Chunk]]] = {}
            for version in self._mine:
                for chunk in version.index.chunks:
                    self._by_key.setdefault(chunk[0], []).append((version, chunk))
        return self._by_key.get(key, [])

    def _unpack(self, buffer: Tensor, arrived: list[Transfer], targets: Sequence[tuple[str, int, Tensor]]) -> None:
        at = 0
        for key, offset, length in (move.chunk for move in arrived):
            dtype = BY_NAME[self.tensors[key]["dtype"]]
            size = length * dtype.itemsize
            values = buffer[at : at + size].clone().view(dtype)  # a message's parts are not aligned
            at += size
            for name, begin, tensor in targets:
                if name == key and begin <= offset and offset + length <= begin + tensor.numel():
                    tensor[offset - begin : offset - begin + length].copy_(values)


def _stamp(entry: Json) -> tuple[int, int]:
    return entry["generation"], entry["step"]


def reshard(
    state: TrainingState, versions: HostVersions, chosen: Chosen, inventories: Sequence[Json],
    group: dist.ProcessGroup, cut: Cut = never,
) -> Resharded:  # fmt: skip
    """Make `state` what it was at the chosen moment, in whatever layout it has now (collective).

    `inventories` are those that `chosen` was chosen from, in the group's order. Host versions stay as they are. Memory:
    WINDOW * MESSAGE_BYTES. Raises UserError for another model, PeerFailed where a peer dies meanwhile (`cut` says so).
    """
    start = time.monotonic()
    saved = Holdings(versions, chosen, inventories, group, cut)
    try:
        restore(state, saved, saved.fill, hyperparameters=True)
    except dist.DistError as error:
        raise PeerFailed(f"a peer died while state was moved: {' '.join(str(error).split())[:300]}") from error
    return Resharded(
        chosen.generation, chosen.step, saved.metadata["extra"], saved.received_bytes, saved.local_bytes,
        time.monotonic() - start,
    )  # fmt: skip
