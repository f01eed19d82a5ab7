"""Who trains on which samples, where replicas go at their own pace: one global order, of which each sample counts once.

    positions    0 ……… next ……………………………… total
                 dealt to replicas | not yet dealt
    open         of each replica: what it was dealt and no exchange has counted yet, in the order in which it trains
    returned     what a lost replica had open: dealt again before anything new

At an exchange that went well `committed` counts what its members have trained on, from the front of what they have
open; then each is dealt so much more that it has `wanted` batches in hand. A replica that comes to no exchange keeps
what it has open, and is lost when it has missed MISSES in a row: then others train on it, and if it comes back after
all, what it did since its last exchange does not count. All of it is a pure function of what the members of an exchange
tell each other, so that they hold the same ledger without a further word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Span = tuple[int, int]
"""Positions [begin, end) of the global order."""
MISSES = 3
"""Exchanges in a row without a replica after which it is lost."""
AHEAD = 2
"""Batches beyond those until the next exchange that a replica has in hand: the one on which the exchange looks, and the
one that is read ahead."""


@dataclass(frozen=True)
class Ledger:
    """The samples of a job of `total` samples in batches of `batch`."""

    total: int
    batch: int
    next: int = 0
    committed: int = 0
    returned: tuple[Span, ...] = ()
    open: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    missed: Mapping[int, int] = field(default_factory=dict)
    """Exchanges in a row that a replica with open samples was not at."""

    @staticmethod
    def begun(total: int, batch: int, wanted: Mapping[int, int], ahead: int = AHEAD) -> Ledger:
        """The beginning: what each replica is dealt first, the batches `ahead` in turns, so that replicas that meet at
        every step train together on what one job would have had in that step."""
        ledger = Ledger(total, batch)
        for count in range(1, ahead + 1):
            ledger = ledger.dealt(dict.fromkeys(wanted, count))
        return ledger.dealt(wanted)

    @property
    def ended(self) -> bool:
        """Whether every sample has been counted."""
        return self.committed >= self.total

    def held(self, replica: int) -> int:
        """Samples that the replica has open."""
        return length(self.open.get(replica, ()))

    def counted(self, trained: Mapping[int, int]) -> Ledger:
        """An exchange has gone well whose members have trained on so many samples since their last one."""
        spans = {**self.open, **{r: rest(self.open.get(r, ()), n) for r, n in trained.items()}}
        return replace(self, committed=self.committed + sum(trained.values()), open=_filled(spans))

    def met(self, members: Sequence[int]) -> Ledger:
        """These were at an exchange, others not."""
        missed = {r: self.missed.get(r, 0) + 1 for r in self.open if r not in members}
        ledger = replace(self, missed={r: n for r, n in missed.items() if n < MISSES})
        for replica in sorted(r for r, n in missed.items() if n >= MISSES):
            ledger = ledger.lost(replica)
        return ledger

    def lost(self, replica: int) -> Ledger:
        """What the replica has open goes to others."""
        spans = {r: own for r, own in self.open.items() if r != replica}
        returned = merged([*self.returned, *self.open.get(replica, ())])
        missed = {r: n for r, n in self.missed.items() if r != replica}
        return replace(self, open=spans, returned=returned, missed=missed)

    def undone(self, replica: int, samples: int) -> Ledger:
        """The first so many samples that the replica has open go to others: what it did with them does not count."""
        own = self.open.get(replica, ())
        returned = merged([*self.returned, *first(own, samples)])
        return replace(self, returned=returned, open=_filled({**self.open, replica: rest(own, samples)}))

    def dealt(self, wanted: Mapping[int, int], beyond: Mapping[int, int] | None = None) -> Ledger:
        """Each replica has at least `wanted` batches in hand, or a fair share of what is left.

        `beyond`: samples that it has open and has trained on already, which do not count.
        """
        beyond = beyond or {}
        lacks = {
            r: max(0, -(-(n * self.batch - self.held(r) + beyond.get(r, 0)) // self.batch)) for r, n in wanted.items()
        }
        left = length(self.returned) + self.total - self.next
        shares = shared_out(-(-left // self.batch), lacks)
        ledger = self
        for replica in sorted(shares):
            ledger = ledger._given(replica, shares[replica] * self.batch)
        return ledger

    def _given(self, replica: int, samples: int) -> Ledger:
        taken = first(self.returned, samples)
        new = min(samples - length(taken), self.total - self.next)
        spans = [*self.open.get(replica, ()), *taken, *([(self.next, self.next + new)] if new else [])]
        return replace(
            self, returned=rest(self.returned, samples), next=self.next + new,
            open=_filled({**self.open, replica: joined(spans)}),
        )  # fmt: skip

    def until(self, total: int) -> Ledger:
        """The ledger of the same job, which now ends after `total` samples: none beyond is dealt or open any more."""
        open_ = _filled({r: below(spans, total) for r, spans in self.open.items()})
        return replace(
            self, total=total, next=min(self.next, total), returned=below(self.returned, total), open=open_
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal ledger back."""
        return {
            "total": self.total, "batch": self.batch, "next": self.next, "committed": self.committed,
            "returned": [[*span] for span in self.returned],
            "open": {str(r): [[*span] for span in spans] for r, spans in self.open.items()},
            "missed": {str(r): n for r, n in self.missed.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        return cls(
            total=value["total"], batch=value["batch"], next=value["next"], committed=value["committed"],
            returned=tuple((a, b) for a, b in value["returned"]),
            open={int(r): tuple((a, b) for a, b in spans) for r, spans in value["open"].items()},
            missed={int(r): n for r, n in value["missed"].items()},
        )  # fmt: skip


def shared_out(batches: int, lacks: Mapping[int, int]) -> dict[int, int]:
    """So many batches, or as many as are lacking, in proportion: the largest fractions are rounded up, then the lowest
    numbers."""
    wanted = sum(lacks.values())
    if wanted <= batches:
        return dict(lacks)
    shares = {r: batches * n // wanted for r, n in lacks.items()}
    over = sorted(lacks, key=lambda r: (-(batches * lacks[r] % wanted), r))
    for replica in over[: batches - sum(shares.values())]:
        shares[replica] += 1
    return shares


def length(spans: Sequence[Span]) -> int:
    return sum(end - begin for begin, end in spans)


def first(spans: Sequence[Span], samples: int) -> tuple[Span, ...]:
    """The first so many samples of the spans."""
    out: list[Span] = []
    for begin, end in spans:
        if samples <= 0:
            break
        out.append((begin, min(end, begin + samples)))
        samples -= end - begin
    return tuple(out)


def rest(spans: Sequence[Span], samples: int) -> tuple[Span, ...]:
    """The spans without their first so many samples."""
    out: list[Span] = []
    for begin, end in spans:
        if samples < end - begin:
            out.append((begin + max(0, samples), end))
        samples -= end - begin
    return tuple(out)


def below(spans: Sequence[Span], position: int) -> tuple[Span, ...]:
    """The spans without samples at this position and beyond."""
    return tuple((begin, min(end, position)) for begin, end in spans if begin < position)


def joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same samples in the same order, in as few spans as that takes."""
    out: list[Span] = []
    for begin, end in spans:
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        elif begin < end:
            out.append((begin, end))
    return tuple(out)


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same samples in ascending order."""
    return joined(sorted(spans))


def _filled(spans: Mapping[int, tuple[Span, ...]]) -> dict[int, tuple[Span, ...]]:
    return {r: own for r, own in sorted(spans.items()) if own}
