"""One replica's part in consensus: its steps, and every so many of them a meeting with the other replicas.

[Note: what is whose] Between two meetings a replica talks to nobody: its losses, skipped steps and clock are its own.
At a meeting it hears on how many samples the others have trained, and its clock becomes the job's; in between it takes
the others to go as fast as at the last meeting. What is said at a meeting: `hearing.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from elastic_lsopt.api.replicas.exchanged import Exchanged, Said, UnderWay
from elastic_lsopt.api.replicas.hearing import Heard, Hearing
from elastic_lsopt.api.replicas.reports import final, fit_of, keeps, ledger_of, spans, trained
from elastic_lsopt.api.replicas.standing import Span, Standing, state_of
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.groups import Group, present
from elastic_lsopt.backends.peers.circles import Circles
from elastic_lsopt.backends.peers.formats import BITS, format_of
from elastic_lsopt.backends.peers.intervals import cut_of
from elastic_lsopt.backends.peers.meeting import Meetings, Met
from elastic_lsopt.by_name import require, require_count, require_number
from elastic_lsopt.consensus.needs import refuse_unmet
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.consensus.terms import refuse_other_terms, terms_of, warn_of_other_beginnings
from elastic_lsopt.data.rounds import Rounds
from elastic_lsopt.errors import NonFinite, PeerFailed, UserError
from elastic_lsopt.optimizers.registry import methods
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.noise.disagreement import Disagreement
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.vector import Vector

NEVER = -1
"""The exchange at which a replica was that has been at none."""
TRIES = 5
INSIDE = timedelta(minutes=30)
"""How long a replica's ranks wait for each other, as in a step: at the start its first waits for other replicas, whose
models may take minutes to load."""


class Consensus:
    """How an engine's replica and the others pull on each other (collective in the replica to make and to use).

    `store` is the job's, which no group has used; `replicas` are those to wait for at first. `timeout_s` is what a
    meeting may take in all, half of it for others to come. `rounds` deals the job's samples (None: the user does, and
    all replicas take tau steps). `newcomer`: this replica has nothing yet, and is to be given the model.
    `disagreement_span`: of so many exchanges the difference from the mean is kept, a Vector each, and one more within
    an exchange; a rule that forms no mean takes one more reduction then (see probes/noise/disagreement.py). Raises
    UserError for a value out of range.
    """

    def __init__(
        self, rule: Rule, store: dist.Store, *, replicas: tuple[int, ...], bits: int = 32, top_k: int | None = None,
        timeout_s: float = 30.0, rounds: Rounds | None = None, by_speed: bool = False, newcomer: bool = False,
        outdated: Callable[[], bool] | None = None, lost: Callable[[int], bool] | None = None,
        disagreement_span: int = 0,
    ) -> None:  # fmt: skip
        require(bits in BITS, "bits", bits, f"one of {', '.join(map(str, BITS))}")
        if top_k is not None:
            require_count("top_k", top_k)
        require_number("exchange_timeout_s", timeout_s, positive=True)
        require_count("disagreement_span", disagreement_span, least=0)
        self.rule, self._store, self.replicas = rule, store, replicas
        self.number = present().number
        """This replica's own."""
        self._bits, self._top_k, self.timeout_s, self.rounds = bits, top_k, timeout_s, rounds
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: UnderWay | None = None
        self.exchanges: list[Exchanged] = []
        """Of this life of the process."""
        self._by_speed, self._fit, self._outdated, self._lost = by_speed, not newcomer, outdated, lost
        self._vacant: tuple[int, ...] = ()
        self._span = Span(disagreement_span)
        self._skipped = self._redealt = False
        self._newest = NEVER  # no state that is saved: a job that starts again counts its meetings anew
        self._there = replicas
        """Who was at the last meeting."""
        self._met_s, self._round_s = time.monotonic(), 0.0
        self.told_to_stop = False
        """This rank is, which ends waiting for others; safe in a signal handler."""
        self.hopeless = False
        """Whether no weights at the newest meeting were finite."""

    @property
    def keep(self) -> tuple[Stateful, ...]:
        """The families of state that the engine keeps for it."""
        return (self.rule, Standing(), *([] if self._span.kept is None else [self._span.kept]))

    def bind(self, step: LandscapeStep) -> None:
        """The engine's step is there: say what this rank holds, and that this replica may be met.

        Raises UserError for a method, a base or a format that the rule does not go with.
        """
        method = methods.name_of(type(step.method))
        refuse_unmet(self.rule, method, step.backend.base, bits=self._bits, top_k=self._top_k)
        if step.evaluates_at is not None:
            raise UserError(
                f"{step.evaluates_at} keeps the model in other places than the weights, which consensus does not move; "
                "use another method and base, such as sam over adamw."
            )
        self._step = step
        groups = step.backend.groups
        rank = groups.replica.rank
        inside = groups.replica.again("consensus", INSIDE)
        self._inside = Group(rank, groups.replica.size, inside)
        self._meet_in(self._store, self.replicas)
        self._cut = gather_json(inside, cut_of(step.space.layout))
        self._begins = step.space.norm(step.space.weights)
        self._terms = terms_of(self.rule, step.space, bits=self._bits, top_k=self._top_k)
        step.of_job = self._of_job

    def _meet_in(self, store: dist.Store, replicas: tuple[int, ...]) -> None:
        """From now on through this store, of which the first rank says that its replica may be met."""
        rank, self._store = self._inside.rank, store
        self._meetings = Meetings(
            store, self.number, replicas, first=rank == 0, inside=self._inside.handle, timeout_s=self.timeout_s,
            outdated=self._outdated, lost=self._lost, told_to_stop=self._to_stop,
            since=0 if self.rounds is None else max(0, self.rounds.version),
        )  # fmt: skip
        self._circles = Circles((self.number, rank), store)
        self._hearing = Hearing(
            self._step, self.rule, format_of(self._bits, self._top_k), self._circles, self._inside, self.number,
            lambda: self._meetings.left, self._meetings.failed, Standing.name, gaps=self.keeps_span,
        )  # fmt: skip
        if rank == 0:
            self._meetings.join()

    def members_changed(
        self, store: dist.Store, living: tuple[int, ...], lost: Callable[[int], bool] | None = None
    ) -> None:
        """Other replicas have come or gone, and the store may be another (collective in the replica, between steps)."""
        self.settled()
        self._lost = self._meetings.lost = lost
        self._vacant = tuple(r for r in range(max(*self.replicas, *living) + 1) if r not in living)
        self.replicas = living
        if store is not self._store:
            self._meet_in(store, living)
        if self._inside.rank == 0:
            self._meetings.vacate(self._vacant)

    # -- around a step -----------------------------------------------------------------------------------------

    def before_step(self, oracle: Oracle) -> bool:
        """A step begins: meet the others if it is time. False where it is not to be taken: others train on its samples
        by now, or have ended the job, or this replica has been told to stop while it waited."""
        if self._under_way is not None and self._standing["since"] >= self.rule.overlap:
            self.settled()
        out_of_samples = self.rounds is not None and not self.rounds.in_hand
        if self._standing["since"] < self.steps and not out_of_samples:
            return True
        self.exchange(oracle, beside=self.rule.overlap > 0)
        return not (self._redealt or self.over or (self.stops and self._standing["since"]))

    def after_step(self, samples: int, *, skipped: bool) -> None:
        """A step has ended, on so many samples."""
        for name, more in (("since", 1), ("samples", samples), ("ahead", self._of_job(samples))):
            self._standing[name] += more
        self._skipped = skipped
        if self.rounds is not None:
            self.rounds.advance(samples)
        if self._inside.rank == 0:
            self._meetings.beat()

    def _of_job(self, samples: int) -> int:
        """What all replicas together have trained on meanwhile, as far as this one can tell."""
        return samples * len(self._there)

    @property
    def steps(self) -> int:
        """Of this replica from one exchange to the next."""
        return self.rule.every if self.rounds is None else self.rounds.steps

    @property
    def fit(self) -> bool:
        """Whether this replica has what the job has come to; else it waits to be given the model."""
        return self._fit

    def newcomer(self) -> None:
        """This replica has nothing of what the job has come to, and is given the model at its first meeting."""
        self._fit = False

    def _to_stop(self) -> bool:
        return self.told_to_stop

    @property
    def stops(self) -> bool:
        """Whether a rank of this replica had been told to stop when it last met others, or tried to."""
        return self._meetings.stops

    @property
    def over(self) -> bool:
        """Whether the others have ended the job without this replica."""
        return self._meetings.over

    @property
    def leads(self) -> bool:
        """Whether this replica is the first of those that were at the last meeting."""
        return self.number == min(self._there)

    def agreed(self, value: Any) -> Any:
        """What the first rank of this replica says, on all of them (JSON; collective in the replica)."""
        return gather_json(self._inside.handle, value)[0]

    def leave(self) -> None:
        """This rank raised, or its replica stops: it is no more, and the others need not wait for it."""
        self._circles.drop()
        self._meetings.leave()

    def conclude(self) -> None:
        """This replica has the model of the end: who comes later is too late."""
        self._meetings.conclude()

    # -- a meeting ---------------------------------------------------------------------------------------------

    def exchange(self, oracle: Oracle | None, *, beside: bool = False) -> Exchanged | None:
        """Meet the others now; None where they met without this replica, or where it goes on `beside` steps."""
        self.settled()
        met, self._redealt = self._begin(last=False), False
        if met is None and (self.stops or self.over):
            return None
        self._standing["since"] = 0
        now = time.monotonic()
        self._round_s, self._met_s = now - self._met_s, now
        if met is None:
            return None
        self.hopeless = not any(report["finite"] for report in met.reports.values())
        fit = self._fit_of(met)
        told = self.rule.snapshot(self._step.space, self._hearing.state, met.number) if self.number in fit else {}
        act = partial(self._hear, met, fit, oracle, told)
        before = dict(self._standing)
        if not beside or not keeps(met, self.number):
            self._under_way = UnderWay(met, fit, act(), before)
            return self.settled()
        self._thread = self._thread or ThreadPoolExecutor(1, "consensus")
        self._under_way = UnderWay(met, fit, self._thread.submit(act), before)
        return None

    def settled(self) -> Exchanged | None:
        """What is under way has come to its end, and takes effect if it went well; None where there was nothing."""
        if self._under_way is None:
            return None
        under, self._under_way = self._under_way, None
        heard, well, why, seconds, sent_bytes = (
            under.said.result() if isinstance(under.said, Future) else under.said
        )  # fmt: skip
        met, fit = under.met, under.fit
        if well and self.number in fit:
            self._hearing.settle(heard)
            self._newest = met.number
            self._span.keep(self._step.families, heard.exchange, met.number)
        elif well:
            assert heard.point is not None  # all that are there and not fit are given it
            self._step.space.weights.copy_(heard.point)
            self._step.begin_anew()
            self._fit, self._skipped, self._newest = True, False, NEVER
        else:
            self._circles.drop()
        self._step.space.copies.refresh()
        self._count(met, fit, under.before, well=well)
        gram = heard.exchange.known_gram if well and heard.exchange is not None else None
        disagreement = None if gram is None else Disagreement(gram)
        missing = tuple(sorted({*self._there} - {*met.members}))
        self._there = met.members
        self.exchanges.append(
            Exchanged(met.number, met.members, fit, missing, well, why, seconds, sent_bytes, disagreement)
        )
        return self.exchanges[-1]

    def _hear(self, met: Met, fit: tuple[int, ...], oracle: Oracle | None, told: dict[str, Any]) -> Said:
        """All that is said, and the verdict."""
        begin, sent_bytes, heard, why = time.monotonic(), self._circles.sent_bytes, Heard(), ""
        try:
            if final(met):  # the others have ended: this replica is late, and hears what they have come to
                heard = Heard(point=self._hearing.point(met, fit))
            else:
                heard = self._hearing.hear(met, fit, oracle, told)
        except (PeerFailed, NonFinite) as error:  # the vote says so
            why = str(error)
        exchange = heard.exchange
        well = self._meetings.end(met, well=not why, watch=None if exchange is None else exchange.watch)
        return heard, well, why, time.monotonic() - begin, self._circles.sent_bytes - sent_bytes

    def _begin(self, *, last: bool) -> Met | None:
        """Say that this replica is there; `last`: for the model at the end."""
        common, version = (None, -1) if self.rounds is None else (self.rounds.ledger.to_json(), self.rounds.version)
        met = self._meetings.begin(
            self._report(last), common, version=version, patience_s=self._patience_s, late_s=2 * self._round_s
        )
        if met is not None:
            refuse_other_terms({m: report["terms"] for m, report in met.reports.items()})
            if not self.exchanges and self.rounds is None and not last:
                warn_of_other_beginnings({m: report["begins"] for m, report in met.reports.items()})
        return met

    def _report(self, last: bool) -> dict[str, Any]:
        space = self._step.space
        finite = math.isfinite(space.norm(space.weights))
        return {
            **self._hearing.report(), "cut": self._cut, "final": last, "terms": self._terms, "begins": self._begins,
            "samples": self._standing["samples"], "newest": self._newest,
            "fit": self._fit and finite and not self._skipped, "finite": finite,
            "clock": self._step.clock.samples - self._standing["ahead"], "pace": self._pace,
            "held": [] if self.rounds is None else spans(self.rounds.ledger, self.number), "vacant": self._vacant,
        }  # fmt: skip

    @property
    def _pace(self) -> float:
        if self._by_speed and self._round_s > 0 and (samples := self._standing["samples"]):
            return samples / self._round_s
        return float(self._inside.size)

    @property
    def _patience_s(self) -> float:
        """A new replica has nothing else to do, nor has one without samples, until the others come."""
        if not self._fit:
            return math.inf
        idle = self.rounds is not None and self._standing["since"] < self.steps
        return 2 * self._round_s if idle else 0.0

    def _fit_of(self, met: Met) -> tuple[int, ...]:
        """Alike on all members, as is all that follows from it."""
        if not keeps(met, self.number):
            self._redealt, self._fit, self._standing["samples"] = True, False, 0
        return fit_of(met)

    def _count(self, met: Met, fit: tuple[int, ...], before: dict[str, Any], *, well: bool) -> None:
        """Samples, clock and the next round, alike on all members; `before` is how this replica stood at the meeting,
        and what it has trained on since counts the next time."""
        samples = trained(met)
        counted = {m: samples[m] for m in fit} if well else {}
        if self.rounds is not None:
            undone = {m: n for m, n in samples.items() if m not in fit} if well else {}
            paces = {m: report["pace"] for m, report in met.reports.items()}
            self.rounds.version = met.number + 1
            since, beyond = self._standing["samples"] - before["samples"], {} if well else samples
            self.rounds.settle(
                ledger_of(met), counted=counted, beyond=beyond, undone=undone, paces=paces, since=max(0, since)
            )
        if well:
            standing = self._standing
            clock = max(report["clock"] for report in met.reports.values()) + sum(counted.values())
            for name in ("samples", "ahead"):
                standing[name] = max(0, standing[name] - before[name])
            self._step.clock = replace(self._step.clock, samples=clock + standing["ahead"])

    def point(self) -> Vector:
        """The model that the rule's paper evaluates, on all who meet for it; they go on as they are (collective).

        Raises PeerFailed where it is not formed in TRIES meetings.
        """
        self.settled()
        self.told_to_stop = False  # so near the end
        for _ in range(TRIES):
            met = self._begin(last=True)
            if self.over:
                raise PeerFailed("the other replicas have formed their final model without this one")
            if met is None:
                continue
            point: Vector | None = None
            with suppress(PeerFailed):
                point = self._hearing.point(met, self._fit_of(met))
            if self._meetings.end(met, well=point is not None) and point is not None:
                self._there = tuple(m for m in met.members if met.reports[m]["final"])  # others were late for it
                return point
            self._circles.drop()
        raise PeerFailed(f"the replicas could not form their final model in {TRIES} meetings")

    # -- what it tells -----------------------------------------------------------------------------------------

    @property
    def keeps_span(self) -> bool:
        """Whether differences from the mean are kept."""
        return self._span.kept is not None

    @property
    def in_the_span(self) -> dict[str, Any]:
        """What of the newest step's gradient lies in the span of the differences that are kept, for its row."""
        newest = self.exchanges[-1].number if self.exchanges else None
        return self._span.told(self._step.families, self._step.space, newest)

    def beside(self, eigenvectors: Basis) -> dict[str, Any]:
        """That span beside orthonormal eigenvectors; nothing where none is kept (collective in the replica)."""
        return self._span.beside(self._step.families, self._step.space, eigenvectors)

    @property
    def _standing(self) -> dict[str, Any]:
        return state_of(self._step.families, Standing.name)
