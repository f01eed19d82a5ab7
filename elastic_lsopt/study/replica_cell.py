"""One replica of a comparison's run: as `elastic-lsopt train` has it, but without a folder; and what all of them come to.

The processes of a run share, beside what the job exchanges, a group of their own, by which each learns how far apart
all were at the end and what all have sent. Nothing of it is counted in the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.backends.groups import Group, gloo
from elastic_lsopt.errors import Diverged
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.training.replica_run import ReplicaRun

TOGETHER = timedelta(minutes=10)
"""How long replicas wait for each other's last step."""


@dataclass(frozen=True)
class Together:
    """What all replicas have come to, alike on each of them."""

    sent_bytes: int
    """By all in all exchanges."""
    consensus_distance: float
    """Root mean square distance from the replicas to their mean, after their last steps and before the last exchange."""
    sick: int
    """Exchanges in which a replica was given the model by the others, because its own was not finite."""


class ReplicaOfCell(ReplicaRun):
    """A replica of one process."""

    _apart: float | None = None
    _skipped = 0

    @property
    def speaks(self) -> bool:
        """Whether the run's numbers are this process's to tell."""
        return self.world.speaks

    def advance(self, microbatches: Any) -> tuple[float, StepReport]:
        """As ever. Raises Diverged where it skips steps, and the others do not help it."""
        lr, report = super().advance(microbatches)
        self._skipped = self._skipped + 1 if report.skipped else 0
        if self._skipped >= max(self.config.max_skipped_steps, 3 * self._consensus_of.steps):
            raise Diverged(f"{self._skipped} steps in a row were skipped: replica {self.world.replica} has diverged")
        return lr, report

    def together(self) -> Together:
        """After the last step (collective among the replicas). Raises RuntimeError where an exchange was without one
        that was well: the run is of fewer replicas then, by the machine's fault and not the method's."""
        assert self._apart is not None
        everyone, exchanges = set(range(self._block.replicas)), self._consensus_of.exchanges
        lost = next((told for told in exchanges if not told.well or {*told.members} != everyone), None)
        if lost is not None:
            raise RuntimeError(f"exchange {lost.number} was without a replica: {lost.why or f'only {lost.members} came'}")
        told = torch.tensor([float(sum(each.sent_bytes for each in exchanges))], dtype=torch.float64)
        self._sum_(told)
        return Together(round(told.item()), self._apart, sum(each.fit != each.members for each in exchanges))

    def _meet(self) -> None:
        """The last exchange: all have trained on what they were dealt."""
        if self._apart is None:
            self._apart = self._distance()
        super()._meet()

    def _distance(self) -> float:
        weights = torch.cat([piece.double().flatten() for piece in self.engine.space.weights.tensors])
        mean = self._sum_(weights.clone()) / self._block.replicas
        squares = self._sum_((weights - mean).square().sum().reshape(1))
        return math.sqrt(squares.item() / self._block.replicas)

    def _sum_(self, values: Tensor) -> Tensor:
        if not hasattr(self, "_group"):
            rank, size = self.world.replica, self._block.replicas
            store = dist.PrefixStore("comparison", self.world.store)
            self._group = Group(rank, size, gloo(store, rank, size, TOGETHER), store)
        return self._group.sum_(values)

    def _save(self) -> None:
        """A run of a comparison leaves nothing."""
