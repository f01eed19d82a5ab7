"""What a replica keeps beside its rule's state: where it stands, and how it has differed from the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic_lsopt.backends.peers.exchange import Exchange
from elastic_lsopt.consensus.fragments import within
from elastic_lsopt.oracle.family import Family, Kept, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.probes.noise.disagreement import FAMILY, DisagreementSpan
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace


@dataclass(frozen=True)
class Standing(Stateful):
    """Where a replica stands: its steps and samples since the last exchange, those of the job; and what a format keeps,
    rounding's rest and the reference from which differences are told."""

    name: str = "consensus_standing"

    def init(self, space: ParameterSpace) -> State:
        return {"since": 0, "samples": 0, "ahead": 0}


class Span:
    """The span of a replica's differences from the mean in its last exchanges; of `exchanges` 0, nothing."""

    def __init__(self, exchanges: int) -> None:
        self.kept = DisagreementSpan(exchanges) if exchanges else None
        self._newest: int | None = None
        """The newest exchange that it is of, in this life of the process."""

    def keep(self, families: Mapping[str, Family], exchange: Exchange | None, number: int) -> None:
        """What exchange `number` has told of this replica's difference."""
        if self.kept is not None and exchange is not None and exchange.gap is not None:
            self.kept.keep(state_of(families, FAMILY), exchange.gap, partial(within, exchange.space))
            self._newest = number

    def told(self, families: Mapping[str, Family], space: ParameterSpace, number: int | None) -> dict[str, Any]:
        """What of the newest step's gradient lies in it, where exchange `number` is the newest of all."""
        if self.kept is None or number is None or number != self._newest:
            return {}
        return self.kept.told(space, state_of(families, FAMILY))

    def beside(self, families: Mapping[str, Family], space: ParameterSpace, eigenvectors: Basis) -> dict[str, Any]:
        """It beside orthonormal eigenvectors; nothing where none is kept (collective in the replica)."""
        return {} if self.kept is None else self.kept.beside(space, state_of(families, FAMILY), eigenvectors)


def state_of(families: Mapping[str, Family], name: str) -> dict[str, Any]:
    """The state of a family that is kept as it is."""
    family = families[name]
    assert isinstance(family, Kept)
    return family.state
