"""One replica's part in consensus: its steps, and every tau of them a meeting with the other replicas.

[Note: what is whose] Between two meetings a replica talks to nobody: its losses, skipped steps and clock are its own.
At a meeting it hears on how many samples the others have trained, and its clock becomes the job's; in between it takes
the others to go as fast as at the last meeting.

[Note: who takes part] A member is *fit* if it has what the job has come to, its weights are finite and its last step
was not skipped. The fit ones exchange. Those of them who were not at the newest exchange are first given what all have
alike (the centre, the outer momentum). A member that is not fit, because it is new, has lost its numbers, or comes back
when others already train on its samples, is given the model and begins anew with it: its own momentum at zero, its own
averages from there. It takes part from the next meeting on.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.groups import Group
from elastic_lsopt.backends.peers.circles import Circles
from elastic_lsopt.backends.peers.exchange import REFERENCE, Exchange
from elastic_lsopt.backends.peers.formats import BITS, format_of
from elastic_lsopt.backends.peers.intervals import cut_of
from elastic_lsopt.backends.peers.meeting import Meetings, Met
from elastic_lsopt.by_name import require, require_count, require_number
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.data.ledger import Ledger
from elastic_lsopt.data.rounds import Rounds
from elastic_lsopt.errors import NonFinite, PeerFailed
from elastic_lsopt.oracle.family import Kept, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

NEVER = -1
"""The exchange at which a replica was that has been at none."""
TRIES = 5


@dataclass(frozen=True)
class Standing(Stateful):
    """Where a replica stands: the newest exchange that it was at, its steps and samples since, those of the job; and
    what a format keeps, rounding's rest and the reference from which differences are told."""

    name: str = "consensus_standing"

    def init(self, space: ParameterSpace) -> State:
        return {"newest": NEVER, "since": 0, "samples": 0, "ahead": 0}


@dataclass(frozen=True)
class Exchanged:
    """One meeting, as the journal tells it."""

    number: int
    members: tuple[int, ...]
    fit: tuple[int, ...]
    """The members that exchanged; the others were given the model."""
    missing: tuple[int, ...]
    """Who was at the exchange before, and not at this one."""
    well: bool
    """It went well on all; else none of them has changed anything."""
    why: str
    """What failed on this rank; empty where nothing did."""
    seconds: float
    sent_bytes: int
    """By this rank."""
    apart: float | None = None
    """Root mean square distance of the fit members from their mean, before it; None where no reduction tells it."""

    @property
    def extraordinary(self) -> bool:
        """Whether somebody was left out, let in or missing, or it failed."""
        return not self.well or self.fit != self.members or bool(self.missing)


@dataclass
class _Heard:
    """What takes effect if the meeting went well."""

    exchange: Exchange | None = None
    rules: Any = None
    shared: dict[str, Vector] = field(default_factory=dict)
    point: Vector | None = None


class Consensus:
    """How an engine's replica and the others pull on each other (collective in the replica to make and to use).

    `store` is the job's, which no group has used; `replicas` are those to wait for at first. `timeout_s` is what a
    meeting may take in all, half of it for others to come. `rounds` deals the job's samples (None: the user does, and
    all replicas take tau steps). `newcomer`: this replica has nothing yet, and is to be given the model (`enter`).
    Raises UserError for a value out of range.
    """

    def __init__(
        self, rule: Rule, store: dist.Store, *, replicas: tuple[int, ...], bits: int = 32, top_k: int | None = None,
        timeout_s: float = 30.0, rounds: Rounds | None = None, by_speed: bool = False, newcomer: bool = False,
    ) -> None:  # fmt: skip
        require(bits in BITS, "bits", bits, f"one of {', '.join(map(str, BITS))}")
        if top_k is not None:
            require_count("top_k", top_k)
        require_number("exchange_timeout_s", timeout_s, positive=True)
        self.rule, self._store, self._replicas = rule, store, replicas
        self._format, self.timeout_s, self.rounds = format_of(bits, top_k), timeout_s, rounds
        self.exchanges: list[Exchanged] = []
        """Of this life of the process."""
        self._by_speed, self._fit = by_speed, not newcomer
        self._skipped = self._redealt = False
        self._there = replicas
        """Who was at the last meeting."""
        self._met_s, self._round_s = time.monotonic(), 0.0

    @property
    def keep(self) -> tuple[Stateful, ...]:
        """The families of state that the engine keeps for it."""
        return (self.rule, Standing())

    def bind(self, step: LandscapeStep) -> None:
        """The engine's step is there: say what this rank holds, and that this replica may be met."""
        self._step = step
        groups = step.backend.groups
        self.number, rank = groups.number, groups.replica.rank
        inside = groups.replica.again("consensus", timedelta(seconds=max(60.0, 2 * self.timeout_s)))
        self._inside = Group(rank, groups.replica.size, inside)
        self._meetings = Meetings(
            self._store, self.number, self._replicas, first=rank == 0, inside=inside, timeout_s=self.timeout_s
        )
        self._circles = Circles((self.number, rank), self._store)
        self._cut = gather_json(inside, cut_of(step.space.layout))
        step.of_job = self._of_job
        if rank == 0:
            self._meetings.join()

    # -- around a step -----------------------------------------------------------------------------------------

    def before_step(self, oracle: Oracle) -> bool:
        """A step begins: meet the others if it is time. False where others train on its samples by now."""
        out_of_samples = self.rounds is not None and not self.rounds.in_hand
        if self._standing["since"] < self.steps and not out_of_samples:
            return True
        self.exchange(oracle)
        return not self._redealt

    def after_step(self, samples: int, *, skipped: bool) -> None:
        """A step has ended, on so many samples."""
        for name, more in (("since", 1), ("samples", samples), ("ahead", self._of_job(samples))):
            self._standing[name] += more
        self._skipped = skipped
        if self.rounds is not None:
            self.rounds.advance(samples)

    def _of_job(self, samples: int) -> int:
        """What all replicas together have trained on meanwhile, as far as this one can tell."""
        return samples * len(self._there)

    @property
    def steps(self) -> int:
        """Of this replica from one exchange to the next."""
        return self.rule.tau if self.rounds is None else self.rounds.steps

    def newcomer(self) -> None:
        """This replica has nothing of what the job has come to, and is given the model at its first meeting."""
        self._fit = False

    def agreed(self, value: Any) -> Any:
        """What the first rank of this replica says, on all of them (JSON; collective in the replica)."""
        return gather_json(self._inside.handle, value)[0]

    def leave(self) -> None:
        """This rank raised: its replica is no more, and the others need not wait for it."""
        self._meetings.leave()

    # -- a meeting ---------------------------------------------------------------------------------------------

    def exchange(self, oracle: Oracle | None) -> Exchanged | None:
        """Meet the others now; None where they met without this replica."""
        common, version = (None, 0) if self.rounds is None else (self.rounds.ledger.to_json(), self.rounds.version)
        met = self._meetings.begin(self._report(), common, version=version, patience_s=self._patience_s)
        self._standing["since"], self._redealt = 0, False
        now = time.monotonic()
        self._round_s, self._met_s = now - self._met_s, now
        if met is None:
            return None
        fit, sent_bytes = self._fit_of(met), self._circles.sent_bytes
        heard: _Heard | None = None
        why = ""
        try:
            heard = self._hear(met, fit, oracle)
        except (PeerFailed, NonFinite) as error:  # the vote says so
            why = str(error)
        well = self._meetings.end(met, well=heard is not None)
        if well and heard is not None:
            self._settle(met, fit, heard)
        else:
            self._circles.drop()
        self._count(met, fit, well=well)
        seconds, sent_bytes = time.monotonic() - now, self._circles.sent_bytes - sent_bytes
        apart = heard.exchange.apart if well and heard is not None and heard.exchange is not None else None
        missing = tuple(sorted({*self._there} - {*met.members}))
        self._there = met.members
        self.exchanges.append(Exchanged(met.number, met.members, fit, missing, well, why, seconds, sent_bytes, apart))
        return self.exchanges[-1]

    def _report(self) -> dict[str, Any]:
        space = self._step.space
        finite = math.isfinite(space.norm(space.weights))
        return {
            "samples": self._standing["samples"], "newest": self._standing["newest"], "cut": self._cut,
            "circles": self._circles.told, "fit": self._fit and finite and not self._skipped,
            "clock": self._step.clock.samples - self._standing["ahead"], "pace": self._pace,
            "held": 0 if self.rounds is None else self.rounds.held,
            "refers": REFERENCE in self._standing,
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
        keeps = [m for m in met.members if _keeps(met, m)]
        if self.number not in keeps:
            self._redealt, self._fit, self._standing["samples"] = True, False, 0
        return tuple(m for m in keeps if met.reports[m]["fit"])

    def _hear(self, met: Met, fit: tuple[int, ...], oracle: Oracle | None) -> _Heard:
        """All that is said at this meeting, into Vectors of its own. Raises PeerFailed or NonFinite."""
        heard = _Heard()
        if len(fit) < 2 and len(met.members) == len(fit):
            return heard  # alone
        if not fit:
            raise PeerFailed("no replica that is here has a model that is any good")
        newest = max(met.reports[m]["newest"] for m in fit)
        giver = next(m for m in fit if met.reports[m]["newest"] == newest)
        behind = [m for m in fit if met.reports[m]["newest"] < newest]
        new = [m for m in met.members if m not in fit]
        if behind and self.number in (giver, *behind):
            alike = {**{k: self._state[k] for k in self.rule.shared}, **self._reference(met, giver)}
            heard.shared = {key: self._given(met, giver, behind, vector) for key, vector in alike.items()}
        if self.number in fit:
            kept = {**self._standing, **{k: v for k, v in heard.shared.items() if k == REFERENCE}}
            state = {**self._state, **{k: v for k, v in heard.shared.items() if k in self.rule.shared}}
            exchange = heard.exchange = self._exchange_of(met, fit, kept)
            if len(fit) > 1 and oracle is not None:
                heard.rules = self.rule.exchange(exchange, self._step.space, oracle, state)
            if new:
                heard.point = self.rule.point(exchange, self._step.space, state)
        if new and self.number in (giver, *new):
            heard.point = self._given(met, giver, new, heard.point)
        return heard

    def _reference(self, met: Met, giver: int) -> dict[str, Vector]:
        """Of a format in few bits what all have alike; who was not there has room for it."""
        known = self._standing.get(REFERENCE)
        if not met.reports[giver]["refers"]:
            return {}
        return {REFERENCE: known if isinstance(known, Vector) else self._step.space.zeros()}

    def _given(self, met: Met, giver: int, others: list[int], vector: Vector | None) -> Vector:
        """The giver's, on these members too."""
        circle = self._circles.of([*sorted([giver, *others])], met, self._meetings.left)
        space = self._step.space
        parts = circle.packed(space.empty() if vector is None else vector)
        return circle.unpacked(circle.from_leader(parts, circle.members.index(giver)), space)

    def _exchange_of(self, met: Met, fit: tuple[int, ...], kept: State) -> Exchange:
        return Exchange(
            self._step.space, self._circles.of(fit, met, self._meetings.left), self._format, number=self.number,
            samples=tuple(met.reports[m]["samples"] for m in fit), last=met.number, kept=kept, inside=self._inside,
        )  # fmt: skip

    def _settle(self, met: Met, fit: tuple[int, ...], heard: _Heard) -> None:
        """What was heard takes effect. No communication with other replicas."""
        space = self._step.space
        if self.number in fit:
            if heard.rules is not None and heard.exchange is not None:
                self._state.update({k: v for k, v in heard.shared.items() if k in self.rule.shared})
                self.rule.settle(heard.rules, space, self._state)
                self._standing.update(heard.exchange.told())
            self._standing["newest"] = met.number
        else:
            assert heard.point is not None
            space.weights.copy_(heard.point)
            self._step.begin_anew()
            self._fit, self._skipped = True, False
        space.copies.refresh()

    def _count(self, met: Met, fit: tuple[int, ...], *, well: bool) -> None:
        """Samples, clock and the next round, alike on all members."""
        samples = {m: report["samples"] if _keeps(met, m) else 0 for m, report in met.reports.items()}
        counted = {m: samples[m] for m in fit} if well else {}
        if self.rounds is not None:
            undone = {m: n for m, n in samples.items() if m not in fit} if well else {}
            paces = {m: report["pace"] for m, report in met.reports.items()}
            ledger = Ledger.from_json(met.common)
            for member in (m for m in met.members if not _keeps(met, m)):
                ledger = ledger.lost(member)
            self.rounds.version = met.number + 1
            self.rounds.settle(ledger, counted=counted, beyond={} if well else samples, undone=undone, paces=paces)
        if well:
            clock = max(report["clock"] for report in met.reports.values()) + sum(counted.values())
            self._step.clock = replace(self._step.clock, samples=clock)
            self._standing.update({"samples": 0, "ahead": 0})

    def point(self) -> Vector:
        """The model that the rule's paper evaluates, on all who meet for it; they go on as they are (collective).

        Raises PeerFailed where it is not formed in TRIES meetings.
        """
        for _ in range(TRIES):
            met = self._meetings.begin(self._report())
            point: Vector | None = None
            if met is None:
                continue
            fit = self._fit_of(met)
            with suppress(PeerFailed):
                if self.number in fit:
                    exchange = self._exchange_of(met, fit, {**self._standing})
                    point = self.rule.point(exchange, self._step.space, self._state)
                elif not fit:
                    point = self._step.space.weights.clone()
            if self._meetings.end(met, well=point is not None) and point is not None:
                return point
            self._circles.drop()
        raise PeerFailed(f"the replicas could not form their final model in {TRIES} meetings")

    @property
    def _state(self) -> dict[str, Any]:
        return self._kept(self.rule.family)

    @property
    def _standing(self) -> dict[str, Any]:
        return self._kept(Standing.name)

    def _kept(self, name: str) -> dict[str, Any]:
        family = self._step.families[name]
        assert isinstance(family, Kept)
        return family.state


def _keeps(met: Met, member: int) -> bool:
    """Whether a member still has the samples that it takes for its own."""
    return met.common is None or Ledger.from_json(met.common).held(member) == met.reports[member]["held"]
