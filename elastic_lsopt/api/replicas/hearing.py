"""What replicas say to each other at one meeting, and what takes effect of it when all have heard all.

[Note: who takes part] A member is *fit* if it has what the job has come to, its weights are finite and its last step
was not skipped. The fit ones exchange. Those of them who were not at the newest exchange are first given what all have
alike (the centre, the outer momentum). A member that is not fit, because it is new, has lost its numbers, or comes back
when others already train on its samples, is given the model and begins anew with it: its own momentum at zero, its own
averages from there. It takes part from the next meeting on.

[Note: an exchange beside steps] A rule that streams has its exchange in a thread, while steps go on. The thread uses
groups that nothing else uses meanwhile (the circles, and one within the replica), copies that `snapshot` has made, and
of the state only what no step moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.groups import Group
from elastic_lsopt.backends.peers.circles import Circles
from elastic_lsopt.backends.peers.exchange import LEFT, REFERENCE, Exchange
from elastic_lsopt.backends.peers.formats import Format
from elastic_lsopt.backends.peers.meeting import Met
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.backends.peers.unison import Unison
from elastic_lsopt.consensus.fragments import within
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import PeerFailed
from elastic_lsopt.oracle.family import Kept
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass
class Heard:
    """What takes effect if the meeting went well."""

    exchange: Exchange | None = None
    rules: Any = None
    alike: dict[str, Any] = field(default_factory=dict)
    """Of the rule's state, what this replica had missed."""
    reference: Vector | None = None
    point: Vector | None = None
    """The model, for a replica that is not fit."""


class Hearing:
    """One rank's part in what is said.

    `inside` are its replica's ranks; `left` tells what is left of the meeting's time, `failed` whether it has failed;
    `standing` names what is kept of the format; `gaps`: differences from the mean are wanted.
    """

    def __init__(
        self, step: LandscapeStep, rule: Rule, form: Format, circles: Circles, inside: Group, number: int,
        left: Callable[[], timedelta], failed: Callable[[Met], bool], standing: str, *, gaps: bool = False,
    ) -> None:  # fmt: skip
        self._step, self._rule, self._format, self._circles, self._number = step, rule, form, circles, number
        self._inside, self._together, self._left, self._failed = inside, Unison(inside), left, failed
        self._standing_name = standing
        self._gaps = gaps

    @property
    def state(self) -> dict[str, Any]:
        """The rule's."""
        return self._kept(self._rule.family)

    @property
    def _standing(self) -> dict[str, Any]:
        return self._kept(self._standing_name)

    def _kept(self, name: str) -> dict[str, Any]:
        family = self._step.families[name]
        assert isinstance(family, Kept)
        return family.state

    def report(self) -> dict[str, Any]:
        """What the others must know of what is kept here."""
        numbers = {k: self.state[k] for k in self._rule.shared if not isinstance(self.state[k], Vector)}
        return {"circles": self._circles.told, "refers": REFERENCE in self._standing, "alike": numbers}

    def hear(self, met: Met, fit: Sequence[int], oracle: Oracle | None, told: dict[str, Any]) -> Heard:
        """All that is said, into Vectors of its own; `told` is the rule's snapshot (collective among the members).

        Raises PeerFailed where one is gone, NonFinite where a rule's own gradient is none.
        """
        heard = Heard()
        self._circles.only(met)
        if len(fit) < 2 and len(met.members) == len(fit):
            return heard  # alone
        if not fit:
            raise PeerFailed("no replica that is here has a model that is any good")
        newest = max(met.reports[m]["newest"] for m in fit)
        giver = next(m for m in fit if met.reports[m]["newest"] == newest)
        behind = [m for m in fit if met.reports[m]["newest"] < newest]
        new = [m for m in met.members if m not in fit]
        if behind and self._number in (giver, *behind):
            self._catch_up(heard, met, giver, behind)
        if self._number in fit:
            exchange = heard.exchange = self._exchange(met, fit, heard)
            if len(fit) > 1:
                heard.rules = self._rule.exchange(exchange, self._step.space, oracle, {**told, **heard.alike})
                if self._gaps and not self._rule.overlap:  # beside steps the weights are not still
                    exchange.differ(exchange.space.weights)
            if new:
                whole = self._exchange(met, fit, heard, whole=True)
                heard.point = self._rule.point(whole, self._step.space, {**self.state, **heard.alike})
        if new and self._number in (giver, *new):
            heard.point = self._given(met, giver, new, heard.point)
        return heard

    def point(self, met: Met, fit: Sequence[int]) -> Vector:
        """The model that the rule's paper evaluates, of the members that are fit and on all (collective among them)."""
        if not fit:
            return self._step.space.weights.clone()
        point: Vector | None = None
        if self._number in fit:
            point = self._rule.point(self._exchange(met, fit, Heard(), whole=True), self._step.space, self.state)
        new = [m for m in met.members if m not in fit]
        if point is None or (new and self._number == fit[0]):
            point = self._given(met, fit[0], new, point)
        return point

    def settle(self, heard: Heard) -> None:
        """What a fit replica has heard takes effect. No communication."""
        if heard.rules is None or heard.exchange is None:
            return
        self.state.update(heard.alike)
        self._rule.settle(heard.rules, self._step.space, self.state)
        for name, vector in heard.exchange.told().items():
            kept = self._standing.setdefault(name, self._step.space.zeros())
            within(heard.exchange.space, kept).copy_(vector)

    def _catch_up(self, heard: Heard, met: Met, giver: int, behind: list[int]) -> None:
        """The giver's part of the state that all have alike, on those who were not at the newest exchange."""
        for name in self._rule.shared:
            own = self.state[name]
            given = (
                self._given(met, giver, behind, own) if isinstance(own, Vector) else met.reports[giver]["alike"][name]
            )
            heard.alike[name] = given
        if met.reports[giver]["refers"]:
            known = self._standing.get(REFERENCE)
            heard.reference = self._given(met, giver, behind, known if isinstance(known, Vector) else None)

    def _exchange(self, met: Met, fit: Sequence[int], heard: Heard, *, whole: bool = False) -> Exchange:
        part = self._step.space if whole else self._rule.part(self._step.space, met.number)
        return Exchange(
            part, self._circle(fit, met, part), self._format, number=self._number, last=met.number,
            samples=tuple(met.reports[m]["samples"] for m in fit), kept=self._known(part, heard), inside=self._inside,
            gaps=self._gaps and not whole,
        )  # fmt: skip

    def _known(self, part: ParameterSpace, heard: Heard) -> State:
        """What the format has kept of this part."""
        found = {LEFT: self._standing.get(LEFT), REFERENCE: heard.reference or self._standing.get(REFERENCE)}
        return {name: within(part, vector) for name, vector in found.items() if isinstance(vector, Vector)}

    def _given(self, met: Met, giver: int, others: Sequence[int], vector: Vector | None) -> Vector:
        """The giver's, on these members too."""
        space = self._step.space
        circle = self._circle(sorted([giver, *others]), met, space)
        parts = circle.packed(space.empty() if vector is None else vector)
        heard = self._together(lambda: circle.from_leader(parts, circle.members.index(giver)))
        return circle.unpacked(heard, space)

    def _circle(self, members: Sequence[int], met: Met, part: ParameterSpace) -> Peers:
        whole = self._step.space.layout.parameters
        chosen = None if part is self._step.space else {p.name for p in part.layout.parameters}
        numbers = None if chosen is None else [i for i, p in enumerate(whole) if p.name in chosen]
        over = partial(self._failed, met)
        return self._together(lambda: self._circles.of(members, met, self._left(), over, numbers))
