"""One replica's place in the ledger of samples: what it has in hand, and how many steps it takes until it meets others.

    steps of a replica until its next exchange    tau x its pace over the members' mean pace

so that replicas of unequal size or speed come to an exchange at the same time, with unequal numbers of samples. The
pace of a replica is what it says of itself: its ranks, or its samples per second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic_lsopt.data.draws import Draws
from elastic_lsopt.data.ledger import AHEAD, Ledger, Span, first, rest
from elastic_lsopt.data.loader import Dataset, Shuffled, StepLoader
from elastic_lsopt.oracle.microbatch import MicroBatch


class Rounds:
    """The ledger as replica `number` knows it. `trained` are its samples since its last exchange that went well."""

    def __init__(
        self, ledger: Ledger, number: int, tau: int, paces: Mapping[int, float], *, ahead: int = AHEAD
    ) -> None:  # fmt: skip
        self.number, self.tau, self.ahead = number, tau, ahead
        self.trained = self.cursor = 0
        """`cursor`: in this life of its process, with those before it that no exchange has counted."""
        self.version = 0
        """Of the ledger: how many exchanges the job had seen when it was made; below 0: it is nobody's."""
        self.steps = steps_of(tau, paces)[number]
        """From one exchange to the next."""
        self._take(ledger)

    def resume(self, ledger: Ledger, trained: int, version: int = 0) -> None:
        """Go on from a ledger, of what it has open for this replica so much trained."""
        self.trained = self.cursor = trained
        self.version = version
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
        paces: Mapping[int, float], since: int = 0,
    ) -> None:  # fmt: skip
        """An exchange is over, alike on all its members (the keys of `paces`); `ledger` is the one before it.

        Of what members have trained on since their last exchange: `counted` is taken in; `beyond` is not, as it did not
        go well, and will be; `undone` will not, as they begin anew: others train on it again. All are dealt more. This
        replica has trained on `since` samples while the exchange was under way.
        """
        for replica, samples in undone.items():
            ledger = ledger.undone(replica, samples)
        ledger = ledger.counted(counted).met(sorted(paces))
        steps = steps_of(self.tau, paces)
        self.steps, self.trained = steps[self.number], since + beyond.get(self.number, 0)
        self._take(ledger.dealt({r: n + self.ahead for r, n in steps.items()}, beyond))

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
        self.order, self.rounds, self._source = source.order, rounds, source

    def read(self, first: int, count: int, draws: Draws | None = None) -> list[Any]:
        """Those at its cursor first … first + count - 1."""
        spans = self.rounds.spans(first, count)
        return [row for begin, end in spans for row in self._source.read(begin, end - begin, draws)]

    def state_dict(self, committed: int) -> dict[str, Any]:
        """The order, and who trains on what."""
        rounds = self.rounds
        told = {"ledger": rounds.ledger.to_json(), "trained": rounds.trained, "version": rounds.version}
        return {**self._source.state_dict(committed), **told, "replica": rounds.number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError where the dataset's size or the seed is not the saved one."""
        self._source.load_state_dict(state_dict)


class RoundLoader(StepLoader):
    """`StepLoader` of one replica among others: its steps are of what it has in hand, and end when that does.

    When the others have given it more, iterate again. Micro-batches have numbers that differ between replicas.
    """

    def __init__(
        self, dataset: Dataset, collate: Callable[[list[Any]], Any], rounds: Rounds, *, replicas: int, **more: Any
    ) -> None:  # fmt: skip
        self.rounds, self._replicas = rounds, replicas
        super().__init__(dataset, collate, **more)
        self.committed = rounds.cursor

    def _source_of(self, dataset: Any, seed: int) -> InHand:
        return InHand(Shuffled(dataset, seed), self.rounds)

    @property
    def end(self) -> int:
        return self.rounds.end

    def place(self, cursor: int) -> int:
        return self.rounds.spans(cursor, 1)[0][0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the same job, whose ledger and meetings go on too."""
        self.source.load_state_dict(state_dict)
        self.rounds.resume(Ledger.from_json(state_dict["ledger"]), state_dict["trained"], state_dict["version"])
        self.begin_at(self.rounds.cursor)

    def take_back(self) -> None:
        """The step that was given out is not taken, as others train on its samples: what comes next is of what the
        replica has in hand by now, and not what was read ahead."""
        self.undone_steps += 1

    def _unit(self, index: int, position: int, sizes: Sequence[int], draws: Draws, idle: bool = False) -> MicroBatch:
        made = super()._unit(index, position, sizes, draws, idle)
        return replace(made, index=index * self._replicas + self.rounds.number, place=index)
