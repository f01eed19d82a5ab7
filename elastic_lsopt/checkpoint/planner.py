"""Who writes which chunk, and which saved chunks fill a rank's own: pure plans, without communication.

All tensors are flat; a chunk is [offset, offset + length) of one. Any layout of chunks can be loaded into any other.
Every rank computes its own reads from the checkpoint's contents, so a load needs no word from another rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Chunk = tuple[str, int, int]


def share_out(holdings: Sequence[Iterable[Chunk]]) -> list[set[Chunk]]:
    """For each rank the chunks that it writes: each chunk once, by the holder that has least to write so far.

    `holdings` are the chunks (parameter, offset, length) of each rank. Large chunks are dealt first, so that replicas
    share the work evenly.
    """
    holders: dict[Chunk, list[int]] = {}
    for rank, chunks in enumerate(holdings):
        for chunk in chunks:
            holders.setdefault(chunk, []).append(rank)
    load, out = [0] * len(holdings), [set[Chunk]() for _ in holdings]
    for chunk in sorted(holders, key=lambda c: (-c[2], c)):
        rank = min(holders[chunk], key=lambda r: load[r])
        load[rank] += chunk[2]
        out[rank].add(chunk)
    return out


@dataclass(frozen=True)
class Read:
    """`length` elements from element `begin` of the saved chunk at `saved_at`, to `into` of the wanted chunk."""

    file: int
    saved_at: int
    begin: int
    into: int
    length: int


def reads(at: int, length: int, saved: Iterable[Sequence[int]]) -> list[Read]:
    """What fills elements [at, at + length) from the `saved` chunks (offset, length, file), in their order.

    O(chunks). The reads may cover less than `length`: whoever asks must count.
    """
    out = []
    for offset, size, file in saved:
        low, high = max(at, offset), min(at + length, offset + size)
        if low < high:
            out.append(Read(file, offset, low - offset, low - at, high - low))
    return out
