"""Host versions: a rank's whole state after a step, in one buffer of host memory, kept while devices come and go.

    buffer of (generation 3, step 120, rank 1 of 4)
    [ weights/a@0 | base/a/exp_avg@0 | … | method/mean/a@0 | rng/1/cpu@0 | metadata/1@0 ]

A chunk `key@offset` is elements [offset, offset + length) of a flat tensor, as in a checkpoint; `metadata/<rank>` is
the JSON of everything that is no tensor. Where the chunks lie (`Index`) is worked out once and again when the set of
tensors changes (Adam's state appears with the first step); after that a version is one copy. From a GPU it is on its
way when `take` returns, and whoever reads the buffer first waits for it: a mirror's thread, not the one that trains.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.checkpoint.contents import Keys, TrainingState, chunks_of, take_snapshot
from elastic_lsopt.checkpoint.safetensors_file import ALIGNMENT, BY_NAME, DTYPES
from elastic_lsopt.elastic.memory.download import Download

Chunk = tuple[str, int, int]
"""Key, offset, length in elements."""
METADATA, RANDOM = "metadata/", "rng/"
METADATA_BYTES = 4096
"""The JSON's place grows in steps of this, so that a longer number moves nothing."""


@dataclass(frozen=True)
class Index:
    """Where chunks lie in a buffer: chunk -> first byte; `dtypes` and `numels` by key."""

    chunks: dict[Chunk, int]
    dtypes: dict[str, str]
    numels: dict[str, int]
    bytes: int

    def span(self, chunk: Chunk) -> tuple[int, int]:
        """The bytes [begin, end) of a chunk."""
        begin = self.chunks[chunk]
        return begin, begin + chunk[2] * BY_NAME[self.dtypes[chunk[0]]].itemsize

    def to_json(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for (key, offset, length), at in self.chunks.items():
            entry = tensors.setdefault(key, [self.dtypes[key], self.numels[key], []])
            entry[2].append([offset, length, at])
        return {"tensors": tensors, "bytes": self.bytes}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Index:
        """Raises KeyError or ValueError for what `to_json` did not write."""
        tensors = value["tensors"]
        return Index(
            {(key, offset, length): at for key, (_, _, chunks) in tensors.items() for offset, length, at in chunks},
            {key: dtype for key, (dtype, _, _) in tensors.items() if BY_NAME[dtype]},
            {key: numel for key, (_, numel, _) in tensors.items()},
            value["bytes"],
        )

    def restricted(self, chunks: Sequence[Chunk]) -> Index:
        """Only these chunks, in this order, moved together."""
        return lay_out([(chunk, self.dtypes[chunk[0]], self.numels[chunk[0]]) for chunk in chunks])


def lay_out(chunks: Sequence[tuple[Chunk, str, int]]) -> Index:
    """An index of (chunk, dtype, numel of its key), one after another, aligned."""
    places, at = dict[Chunk, int](), 0
    for chunk, dtype, _ in chunks:
        places[chunk] = at
        at += -(-chunk[2] * BY_NAME[dtype].itemsize // ALIGNMENT) * ALIGNMENT
    return Index(places, {c[0]: dtype for c, dtype, _ in chunks}, {c[0]: numel for c, _, numel in chunks}, at)


@dataclass(eq=False)
class Version:
    """What this process holds of the state of (generation, step, rank of world, node): its own, or a mirrored
    peer's."""

    generation: int
    step: int
    rank: int
    world: int
    node: str
    index: Index
    buffer: Tensor
    whole: dict[str, int] = field(default_factory=dict)
    """All ranks' keys and their lengths, as far as this process knows: what must be there to go on from this step."""
    in_flight: int = 0
    """Transfers that read the buffer; it is not used again before they have ended."""
    _crc: int | None = None
    arrived: torch.cuda.Event | None = None
    """After which a GPU's bytes are in the buffer; None: they are."""

    @property
    def stamp(self) -> tuple[int, int]:
        """What versions of one moment share; newer is larger."""
        return self.generation, self.step

    def filled(self) -> Tensor:
        """The buffer, when all bytes are in it."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived = None
        return self.buffer

    def bytes_of(self, chunk: Chunk) -> Tensor:
        begin, end = self.index.span(chunk)
        return self.filled()[begin:end]

    def tensor(self, chunk: Chunk) -> Tensor:
        """A chunk's elements (a view)."""
        return self.bytes_of(chunk).view(BY_NAME[self.index.dtypes[chunk[0]]])

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        [chunk] = [c for c in self.index.chunks if c[0] == f"{METADATA}{self.rank}"]
        return json.loads(self.bytes_of(chunk).numpy().tobytes())

    def checksum(self) -> int:
        """CRC-32 of the chunks (not of the gaps between them), worked out once. Time: 0.2 to 0.4 s per gigabyte."""
        if self._crc is None:
            crc = 0
            for chunk in self.index.chunks:
                crc = zlib.crc32(self.bytes_of(chunk).numpy().data, crc)
            self._crc = crc
        return self._crc


class HostVersions:
    """This process's versions, and its mirrored peers' that `adopt` was given, over all generations that still count.

    Memory: a buffer of the state's size for each version from the committed one on (pinned beside a GPU): trail.py,
    [Note: the bound]. Not for use by several threads; a mirror's thread only reads buffers, and says so in
    `Version.in_flight`.
    """

    def __init__(self, *, node: str = "") -> None:
        self._node = node
        self._own: list[Version] = []
        self._mirrored_peers: list[Version] = []
        self._free: list[Tensor] = []
        self._index: Index | None = None
        self._views: dict[int, list[Tensor]] = {}
        """A buffer's data pointer -> the chunks' views of it, made once: they cost more than the copy does."""
        self._download: Download | None = None
        self._summing: threading.Thread | None = None

    def take(self, state: TrainingState, *, generation: int, step: int, extra: dict[str, Any]) -> Version:
        """Copy the state as it is now; `extra` is the caller's JSON (a loader's cursor, a plan).

        No communication. Raises StaleWeights inside a perturbed pass and before `resync`, Unsupported and UserError as
        a checkpoint does.
        """
        backend = state.backend
        snapshot = take_snapshot(state, step, extra, set(chunks_of(state)), copy=False)
        text = json.dumps(snapshot.metadata, separators=(",", ":")).encode()
        source = {
            (key, offset, tensor.numel()): (tensor, held.numel)
            for key, held in snapshot.tensors.items()
            for offset, tensor in held.chunks
        }
        index = self._index_of(source, f"{METADATA}{backend.groups.job.rank}", len(text))
        buffer = self._buffer(index.bytes, pinned=backend.device.type == "cuda")
        # Before the ranks have told each other, at least all weights must be there, and what was there a step ago.
        weights = Keys.of(backend).weights
        whole = {f"{weights}/{p.name}": p.numel for p in backend.layout.parameters} | self._shared() | index.numels
        version = Version(
            generation, step, backend.groups.job.rank, backend.groups.job.size, self._node, index, buffer, whole
        )
        *chunks, metadata = index.chunks
        version.bytes_of(metadata).numpy()[:] = memoryview(text.ljust(metadata[2]))
        on_host = [c for c in chunks if source[c][0].device.type == "cpu"]
        views = self._views.get(buffer.data_ptr())
        if views is None:
            views = self._views[buffer.data_ptr()] = [version.tensor(c) for c in on_host]
        torch._foreach_copy_(views, [source[c][0] for c in on_host])
        if len(on_host) < len(chunks):
            self._download = self._download or Download(backend.device)
            there = [c for c in chunks if source[c][0].device.type != "cpu"]
            version.arrived = self._download.to(buffer, [index.span(c) for c in there], [source[c][0] for c in there])
        self._own = [v for v in self._own if v.stamp != version.stamp] + [version]
        return version

    def _index_of(self, source: dict[Chunk, tuple[Tensor, int]], metadata: str, text_bytes: int) -> Index:
        known = self._index
        if known is not None:
            *chunks, last = known.chunks
            same = last[0] == metadata and text_bytes <= last[2] and chunks == list(source)
            if same and all(BY_NAME[known.dtypes[c[0]]] == source[c][0].dtype for c in chunks):
                return known
        room = (text_bytes // METADATA_BYTES + 2) * METADATA_BYTES
        self._free.clear()
        self._views.clear()
        self._index = lay_out(
            [(chunk, DTYPES[tensor.dtype], numel) for chunk, (tensor, numel) in source.items()]
            + [((metadata, 0, room), "U8", room)]
        )
        return self._index

    def _shared(self) -> dict[str, int]:
        """What all ranks together had in the version before, but for what is one rank's own."""
        before = self._own[-1].whole if self._own else {}
        return {key: numel for key, numel in before.items() if not key.startswith((METADATA, RANDOM))}

    def _buffer(self, size: int, *, pinned: bool) -> Tensor:
        return self._free.pop() if self._free else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    @property
    def newest(self) -> Version:
        """This process's own newest version. Raises IndexError before the first."""
        return self._own[-1]

    @property
    def held(self) -> list[Version]:
        """All that this process could go on from: own versions and mirrored peers'."""
        return [*self._own, *self._mirrored_peers]

    def commit(self, generation: int, step: int) -> None:
        """Versions of this generation before `step` are needed no more; their buffers are used again."""
        self._recycle(lambda v: v.generation == generation and v.step < step and not v.in_flight)

    def adopt(self, mirrored_peers: Sequence[Version]) -> None:
        """Keep what a mirror has received, after the mirror was closed."""
        self._mirrored_peers += mirrored_peers

    def sum_beside(self) -> None:
        """Begin to work out the checksums of all that is held, in a thread, while the main thread waits for others."""
        held = self.held
        self._summing = threading.Thread(target=lambda: [v.checksum() for v in held], daemon=True, name="checksums")
        self._summing.start()

    @property
    def summed(self) -> list[Version]:
        """What is held, its checksums at hand: those of `sum_beside` are waited for."""
        if self._summing is not None:
            self._summing.join()
        return self.held

    def go_on_from(self, generation: int, step: int) -> None:
        """All go on from that moment: newer versions are of no use, nor are those between it and the oldest.

        The oldest stays until the new generation has mirrored its own: more ranks may hold it.
        """
        chosen = (generation, step)
        kept = {chosen, min([chosen, *(v.stamp for v in self.held)])}
        self._recycle(lambda v: v.stamp not in kept)
        self._mirrored_peers = [v for v in self._mirrored_peers if v.stamp in kept]

    def drop_older_generations(self, number: int) -> None:
        """Forget the versions of generations before `number`: its own are mirrored by now."""
        self._recycle(lambda v: v.generation < number)
        self._mirrored_peers = [v for v in self._mirrored_peers if v.generation >= number]

    def forget(self) -> None:
        """Forget all: this process goes to another replica, whose state is another."""
        self._recycle(lambda v: True)
        self._mirrored_peers.clear()

    def _recycle(self, past: Callable[[Version], bool]) -> None:
        for version in [v for v in self._own if past(v)]:
            self._own.remove(version)
            if version.index is self._index and not version.in_flight:
                self._free.append(version.buffer)
            else:  # another layout's, or a transfer that broke may still read it
                self._views.pop(version.buffer.data_ptr(), None)


def missing(wanted: tuple[int, int], held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of the interval [begin, end) that none of the intervals covers, in order."""
    at, end = wanted
    out = []
    for low, high in sorted(held):
        if min(low, end) > at:
            out.append((at, min(low, end)))
        at = max(at, high)
    return [*out, (at, end)] if at < end else out
