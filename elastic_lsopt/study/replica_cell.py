"""One replica of a comparison's run: as `elastic-lsopt train` has it, but without a folder; and what all come to.

The processes of a run share, beside what the job exchanges, a group of their own, by which each learns how far apart
all were at the end and what all have sent. Nothing of it is counted in the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.backends.groups import beside
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
    """Root mean square distance of the replicas from their mean, after their last steps, before the last exchange."""


class ReplicaOfCell(ReplicaRun):
    """A replica of one process."""

    _apart: float | None = None
    _skipped = _seen = 0

    def advance(self, microbatches: Any) -> tuple[float, StepReport]:
        """As ever. Raises Diverged where a replica has, RuntimeError where an exchange was without one that was well:
        the run would be of fewer replicas then, by the machine's fault and not the method's."""
        lr, report = super().advance(microbatches)
        self._skipped = self._skipped + 1 if report.skipped else 0
        if self._skipped >= max(self.config.max_skipped_steps, 3 * self._consensus_of.steps):
            raise Diverged(f"{self._skipped} steps in a row were skipped: replica {self.world.replica} has diverged")
        self._refuse_less_than_all()
        return lr, report

    def together(self) -> Together:
        """After the last step (collective among the replicas). Raises as `advance` does."""
        self._refuse_less_than_all()
        assert self._apart is not None
        told = torch.tensor([sum(each.sent_bytes for each in self._consensus_of.exchanges)], dtype=torch.float64)
        return Together(round(self._sum_(told).item()), self._apart)

    def _refuse_less_than_all(self) -> None:
        new = self._consensus_of.exchanges[self._seen :]
        self._seen += len(new)
        for told in new:
            if not told.well or len(told.members) < self._block.replicas:
                why = told.why or f"of {self._block.replicas} replicas only {[*told.members]} were there"
                raise RuntimeError(f"exchange {told.number} was not of all replicas: {why}")
            if told.fit != told.members:
                sick = ", ".join(str(member) for member in told.members if member not in told.fit)
                raise Diverged(f"the weights of replica {sick} were not finite, or its last step was skipped")

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
            world = self.world
            self._group = beside("comparison", world.store, world.replica, len(world.sizes), TOGETHER)
        return self._group.sum_(values)

    def _save(self) -> None:
        """A run of a comparison leaves nothing."""
