"""The versions of one generation on their way to the mirror: how far the committed one trails, and what that costs.

    pushed   [ C, …, newest ]        C: every rank's mirrors have it; a step's all-reduce says how far it trails

[Note: the bound] A rank takes no further version before all but `lags` - 1 of its pushed ones are acknowledged. So C
trails by at most `lags`, and at most `lags` + 2 versions exist at a time, own or of each mirrored peer: the committed
one, those that trail, and the one that is being taken. `lags` follows from the bytes that the job may spend; it is 1 at
least, so three versions are the least: one safe, one on its way, one being taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_lsopt.checkpoint.contents import TrainingState
from elastic_lsopt.elastic.memory.budget import MOST_LAGS, lags_within
from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.versions import HostVersions


class Trail:
    """Takes versions, pushes them to `mirror`, and commits what every rank's mirrors have."""

    def __init__(
        self, versions: HostVersions, mirror: Mirror, *, generation: int, budget_bytes: float, timeout_s: float
    ) -> None:
        self._versions, self.mirror, self._generation = versions, mirror, generation
        self._budget_bytes, self._timeout_s = budget_bytes, timeout_s
        self._pushed: list[int] = []
        """Steps that were pushed, from the committed one on."""
        self._lags = 1

    def keep(self, state: TrainingState, step: int, extra: dict[str, Any], *, wait: bool) -> None:
        """A version of this step, on its way to the mirror; with `wait` every shard of it has arrived here.

        Waits where the trail is as long as the memory allows: a slow network slows the steps. Raises PeerFailed.
        """
        if len(self._pushed) - self._acknowledged() >= self._lags:
            self.mirror.wait(self._pushed[-self._lags], timeout_s=self._timeout_s)
        version = self._versions.take(state, generation=self._generation, step=step, extra=extra)
        self.mirror.push(version)
        self._pushed.append(step)
        self._lags = lags_within(self._budget_bytes, version.index.bytes + self.mirror.ward_bytes)
        if wait:
            self.mirror.wait(step, timeout_s=self._timeout_s)

    def lags(self) -> tuple[float, ...]:
        """Whether this rank's mirror trails by more than 0, 1, … versions: its share of `Piggyback.trailing`."""
        trail = len(self._pushed) - self._acknowledged()
        return tuple(float(trail > j) for j in range(MOST_LAGS))

    def heard(self, trailing: Sequence[float]) -> None:
        """Commit what every mirror has acknowledged, by all ranks' lags, summed."""
        trail = next((j for j, ranks in enumerate(trailing) if not ranks), len(trailing))
        if len(self._pushed) > trail:
            self._commit(self._pushed[-1 - trail])

    def commit_newest(self) -> None:
        """All ranks have waited for the newest version."""
        self._commit(self._pushed[-1])

    def _commit(self, step: int) -> None:
        self._versions.commit(self._generation, step)
        self.mirror.commit(step)
        del self._pushed[: self._pushed.index(step)]

    def _acknowledged(self) -> int:
        """How many of the pushed versions, from the first, are complete on this rank and its mirrored peers."""
        newest = self.mirror.acknowledged
        return sum(step <= newest for step in self._pushed)
