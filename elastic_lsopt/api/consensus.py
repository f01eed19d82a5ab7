"""One replica's part in consensus: its steps, and every tau of them a meeting with the other replicas.

[Note: what is whose] Between two meetings a replica talks to nobody: its losses, skipped steps and clock are its own.
At a meeting it hears on how many samples the others have trained, and its clock becomes the job's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.peers.exchange import Exchange
from elastic_lsopt.backends.peers.formats import BITS, format_of
from elastic_lsopt.backends.peers.intervals import Seat, bundles, cut_of
from elastic_lsopt.backends.peers.meeting import Meetings, Met
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.by_name import require, require_number
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import NonFinite, PeerFailed
from elastic_lsopt.oracle.family import Kept, Stateful
from elastic_lsopt.oracle.oracle import Oracle


@dataclass(frozen=True)
class Told(Stateful):
    """What a format keeps: rounding's rest, and the reference from which differences are told."""

    name: str = "consensus_format"


@dataclass(frozen=True)
class Exchanged:
    """One meeting, as the journal tells it."""

    number: int
    members: tuple[int, ...]
    well: bool
    seconds: float
    sent_bytes: int


class Consensus:
    """How an engine's replica and the others pull on each other (collective in the replica to make and to use).

    `store` is the job's, which no group has used; `timeout_s` is what a meeting may take in all. Raises UserError for
    a value out of range.
    """

    def __init__(
        self, rule: Rule, store: dist.Store, *, replicas: tuple[int, ...], bits: int = 32, timeout_s: float = 30.0
    ) -> None:
        require(bits in BITS, "bits", bits, f"one of {', '.join(map(str, BITS))}")
        require_number("exchange_timeout_s", timeout_s, positive=True)
        self.rule, self._store, self._replicas = rule, store, replicas
        self._format, self.timeout_s = format_of(bits), timeout_s
        self.exchanges: list[Exchanged] = []
        """Of this life of the process."""
        self._since = self._samples = 0
        self._peers: Peers | None = None

    @property
    def keep(self) -> tuple[Stateful, ...]:
        """The families of state that the engine keeps for it."""
        return (self.rule, Told())

    def bind(self, step: LandscapeStep) -> None:
        """The engine's step is there: say what this rank holds, and that this replica may be met."""
        self._step = step
        groups = step.backend.groups
        self._number, self._rank = groups.number, groups.replica.rank
        self._own: Seat = (self._number, self._rank)
        inside = groups.replica.again("consensus", timedelta(seconds=max(60.0, 2 * self.timeout_s)))
        self._meetings = Meetings(
            self._store, self._number, self._replicas, first=self._rank == 0, inside=inside, timeout_s=self.timeout_s
        )
        self._cut = gather_json(inside, cut_of(step.space.layout))
        if self._rank == 0:
            self._meetings.join()

    def before_step(self, oracle: Oracle) -> None:
        """A step begins: meet the others if it is time."""
        if self._since >= self.rule.tau:
            self.exchange(oracle)

    def after_step(self, samples: int) -> None:
        """A step has ended, on so many samples."""
        self._since, self._samples = self._since + 1, self._samples + samples

    def leave(self) -> None:
        """This rank raised: its replica is no more, and the others need not wait for it."""
        self._meetings.leave()

    def exchange(self, oracle: Oracle) -> Exchanged | None:
        """Meet the others now; None where they met without this replica."""
        met = self._meetings.begin({"samples": self._samples, "cut": self._cut})
        self._since = 0
        if met is None:
            return None
        heard, exchange, before = None, None, self._peers.sent_bytes if self._peers is not None else 0
        try:
            exchange = self._exchange_of(met)
            heard = self.rule.exchange(exchange, self._step.space, oracle, self._state)
        except (PeerFailed, NonFinite):
            exchange = None
        well = self._meetings.end(met, well=exchange is not None)
        if well and exchange is not None:
            self.rule.settle(heard, self._step.space, self._state)
            exchange.commit()
            self._step.space.copies.refresh()
            self._samples = 0
        else:
            self._peers = None
        sent = self._peers.sent_bytes - before if self._peers is not None else 0
        told = Exchanged(met.number, met.members, well, self.timeout_s - self._meetings.left.total_seconds(), sent)
        self.exchanges.append(told)
        return told

    @property
    def _state(self) -> dict[str, Any]:
        return self._kept(self.rule.family)

    def _kept(self, name: str) -> dict[str, Any]:
        family = self._step.families[name]
        assert isinstance(family, Kept)
        return family.state

    def _exchange_of(self, met: Met) -> Exchange:
        if self._peers is None or self._peers.members != met.members:
            cuts = {
                (replica, rank): [tuple(piece) for piece in cut]
                for replica, report in met.reports.items()
                for rank, cut in enumerate(report["cut"])
            }
            store = dist.PrefixStore(f"peers/{met.number}", self._store)
            self._peers = Peers(
                self._own, met.members, bundles(self._own, cuts, met.members), store, self._meetings.left
            )
        self._peers.limit(self._meetings.left)
        samples = tuple(met.reports[m]["samples"] for m in met.members)
        return Exchange(
            self._step.space, self._peers, self._format, number=self._number, first=self._rank == 0, samples=samples,
            last=met.number, kept=self._kept(Told.name), alike=True, sum_replica=self._step.backend.sum_replica_,
        )  # fmt: skip
