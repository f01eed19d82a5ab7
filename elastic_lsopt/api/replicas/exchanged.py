"""A meeting of replicas: while it is under way, and as the journal tells of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.api.replicas.hearing import Heard
from elastic_lsopt.backends.peers.meeting import Met
from elastic_lsopt.probes.noise.disagreement import Disagreement


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
    disagreement: Disagreement | None = None
    """How far apart the fit members were before it; None where no reduction tells it."""

    @property
    def consensus_distance(self) -> float | None:
        """Root mean square distance of the fit members from their mean, before it."""
        return None if self.disagreement is None else self.disagreement.consensus_distance

    @property
    def extraordinary(self) -> bool:
        """Whether somebody was left out, let in or missing, or it failed."""
        return not self.well or self.fit != self.members or bool(self.missing)


Said = tuple[Heard, bool, str, float, int]
"""What was heard, whether it went well, why not, seconds, and bytes sent."""


@dataclass(frozen=True)
class UnderWay:
    """A meeting whose end has not taken effect."""

    met: Met
    fit: tuple[int, ...]
    said: Said | Future[Said]
    before: dict[str, Any]
    """How this replica stood when it began."""
