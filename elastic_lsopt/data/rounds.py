"""One replica's place in the ledger of samples: what it has in hand, and how many steps it takes until it meets others.

    steps of a replica until its next exchange    tau x its pace over the members' mean pace

so that replicas of unequal size or speed come to an exchange at the same time, with unequal numbers of samples. The
pace of a replica is what it says of itself: its ranks, or its samples per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_lsopt.data.draws import Draws
from elastic_lsopt.data.ledger import AHEAD, Ledger, Span, first, rest
from elastic_lsopt.data.loader import Shuffled


class Rounds:
    """The ledger as replica `number` knows it. `trained` are its samples since its last exchange that went well."""

    def __init__(self, ledger: Ledger, number: int, tau: int, paces: Mapping[int, float]) -> None:
        self.number, self.tau = number, tau
        self.trained = 0
        self.cursor = 0
        """Samples that this replica has trained on in this life of its process."""
        self.steps = steps_of(tau, paces)[number]
        """From one exchange to the next."""
        self._take(ledger)

    @property
    def held(self) -> int:
        """Samples that it was dealt and no exchange has counted."""
        return self.ledger.held(self.number)

    @property
    def in_hand(self) -> int:
        """Samples that it was dealt and has not trained on."""
        return self.held - self.trained

    @property
    def end(self) -> int:
        """Where its cursor will be when it has trained on all that is in hand."""
        return self.cursor + self.in_hand

    def spans(self, cursor: int, samples: int) -> tuple[Span, ...]:
        """Positions in the global order of the samples that stand at its own cursor. Safe in another thread."""
        begin, own = self._open
        return first(rest(own, cursor - begin), samples)

    def advance(self, samples: int) -> None:
        """A step has ended, on so many samples."""
        self.trained += samples
        self.cursor += samples

    def settle(
        self, ledger: Ledger, *, counted: Mapping[int, int], beyond: Mapping[int, int], undone: Mapping[int, int],
        paces: Mapping[int, float],
    ) -> None:  # fmt: skip
        """An exchange is over, alike on all its members (the keys of `paces`); `ledger` is the one before it.

        Of what members have trained on since their last exchange: `counted` is taken in; `beyond` is not, as it did not
        go well, and will be; `undone` will not, as they begin anew: others train on it again. All are dealt more.
        """
        for replica, samples in undone.items():
            ledger = ledger.undone(replica, samples)
        ledger = ledger.counted(counted).met(sorted(paces))
        steps = steps_of(self.tau, paces)
        self.steps, self.trained = steps[self.number], beyond.get(self.number, 0)
        self._take(ledger.dealt({r: n + AHEAD for r, n in steps.items()}, beyond))

    def _take(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._open = self.cursor - self.trained, ledger.open.get(self.number, ())


def steps_of(tau: int, paces: Mapping[int, float]) -> dict[int, int]:
    """Each replica's steps until the next exchange, by its pace; >= 1."""
    mean = sum(paces.values()) / len(paces)
    return {r: max(1, round(tau * pace / mean)) for r, pace in paces.items()}


class InHand:
    """The samples of a replica by its own cursor, out of the job's one order."""

    def __init__(self, source: Shuffled, rounds: Rounds) -> None:
        self.order, self._source, self._rounds = source.order, source, rounds
        self.rewinds: tuple[int, ...] = ()

    def read(self, cursor: int, count: int, draws: Draws | None = None) -> list[Any]:
        spans: Sequence[Span] = self._rounds.spans(cursor, count)
        return [row for begin, end in spans for row in self._source.read(begin, end - begin, draws)]
