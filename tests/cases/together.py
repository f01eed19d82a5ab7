"""Replicas in one process, a thread each: `Replicas` on whole Vectors, exact, for the mathematics of rules alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.consensus.rule import FAMILY, Rule
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from tests.cases import engines

WAIT_S = 20.0
Told = Callable[[Tensor], Tensor]
"""What of a flat vector is told."""


class Room:
    """Where each member of one exchange says what the others hear.

    Members work one at a time, until they wait: two threads that ask torch's default generator for its state at once
    may wait for each other for ever, one with its mutex and without the interpreter's lock, the other the reverse.
    """

    def __init__(self) -> None:
        self._said: dict[Any, Any] = {}
        self._changed = self.turn = threading.Condition()
        self._broken = False

    def say(self, key: Any, what: Any) -> None:
        with self._changed:
            self._said[key] = what.clone()
            self._changed.notify_all()

    def hear(self, key: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._broken or key in self._said, WAIT_S), f"nobody says {key}"
            if key not in self._said:
                raise threading.BrokenBarrierError(f"somebody is gone, who was to say {key}")
            return self._said[key]

    def leave(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class Here:
    """`Replicas` of one member."""

    def __init__(
        self, room: Room, number: int, members: Sequence[int], samples: Sequence[int], last: int, kept: dict[str, Any],
        told: Told | None = None,
    ) -> None:  # fmt: skip
        self.number, self.members, self.samples, self.last = number, tuple(members), tuple(samples), last
        self._room, self._kept, self._told, self._count = room, kept, told, 0

    @property
    def place(self) -> int:
        return self.members.index(self.number)

    def _of_all(self, what: Any) -> list[Any]:
        return self._of(what, self.members)

    def _of(self, what: Any, those: Sequence[int]) -> list[Any]:
        self._count += 1
        self._room.say((self._count, self.number), what)
        return [self._room.hear((self._count, other)) for other in those]

    def numbers(self, *own: float) -> Tensor:
        return torch.stack(self._of_all(torch.tensor(own, dtype=torch.float64)))

    def mean(self, points: Vector, shares: Sequence[float] | Sequence[Sequence[float]] | None = None) -> Vector:
        assert shares is not None, "each rule says how its members count"
        found, out = self._of_all(points), points.clone().zero_()
        for share, point in zip(shares, found, strict=True):
            out.add_(point.clone().mul_each_(share) if isinstance(share, Sequence) else point * share)
        return out

    def sum(self, differences: Vector, share: float = 1.0, *, keep: float = 1.0) -> Vector:
        own = differences * share
        if self._told is not None:
            flat = torch.cat(own.tensors) + keep * self._kept.get("left", 0.0)
            sent = self._told(flat)
            self._kept["left"] = flat - sent
            own = Vector(own.space, sent.split([t.numel() for t in own.tensors]))
        out = differences.clone().zero_()
        for each in self._of_all(own):
            out.add_(each)
        return out

    def of(self, points: Vector, leader: int, among: Sequence[int] | None = None) -> Vector:
        assert among is None or leader in among
        return self._of(points, [leader])[0].clone()

    def swapped(self, points: Vector, neighbours: Sequence[int]) -> Mapping[int, Vector]:
        assert self.number not in neighbours
        return dict(zip(neighbours, self._of(points, neighbours), strict=True))

    def gram(self, points: Vector) -> Tensor:
        flat = torch.stack([torch.cat(p.tensors).double() for p in self._of_all(points)])
        apart = flat - flat.mean(0)
        return apart @ apart.T


@dataclass
class Member:
    """A replica at an exchange."""

    space: ParameterSpace
    state: dict[str, Any]
    oracle: Oracle | None = None
    samples: int = 1
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return torch.cat([t.clone() for t in self.space.weights.tensors])

    @x.setter
    def x(self, values: Tensor) -> None:
        for w, part in zip(
            self.space.weights.tensors, values.split([t.numel() for t in self.space.weights.tensors]), strict=True
        ):
            w.copy_(part)


def at(rule: Rule, *points: Sequence[float] | Tensor) -> list[Member]:
    """Replicas that have just begun, all at the first point, and then are at these points of one parameter (fp64)."""
    out = []
    for point in points:
        values = torch.as_tensor(point, dtype=torch.float64)
        layer = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.as_tensor(points[0], dtype=torch.float64))
        space, _ = lso.attach(layer, lambda model, x: model(x).sum(), [torch.zeros(1, len(values)).double()])
        member = Member(space, {})
        member.state.update(rule.init(space))
        member.x = values
        out.append(member)
    return out


def heard_of(
    rule: Rule, members: Sequence[Member], number: int = 0, *, told: Told | None = None,
    numbers: Sequence[int] | None = None, what: str = "exchange",
) -> list[Any]:  # fmt: skip
    """What each replica has heard in exchange `number`, or the model that is evaluated (`what`: point)."""
    room, names = Room(), list(numbers or range(len(members)))
    samples = [m.samples for m in members]

    def one(name: int, m: Member) -> Any:
        here: Any = Here(room, name, names, samples, number, m.kept, told)
        oracle: Any = m.oracle
        try:
            with room.turn:
                if what == "point":
                    return rule.point(here, m.space, m.state)
                return rule.exchange(here, m.space, oracle, rule.snapshot(m.space, m.state, number))
        except BaseException:
            room.leave()
            raise

    with ThreadPoolExecutor(len(members)) as threads:
        waiting = [threads.submit(one, name, m) for name, m in zip(names, members, strict=True)]
    errors = [e for w in waiting if (e := w.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [w.result() for w in waiting]


def settle(rule: Rule, members: Sequence[Member], heard: Sequence[Any]) -> None:
    for m, h in zip(members, heard, strict=True):
        rule.settle(h, m.space, m.state)
        m.space.copies.refresh()


def meet(rule: Rule, members: Sequence[Member], number: int = 0, **more: Any) -> list[Tensor]:
    """One exchange; where the replicas are then."""
    settle(rule, members, heard_of(rule, members, number, **more))
    return [m.x for m in members]


def point(rule: Rule, members: Sequence[Member]) -> list[Tensor]:
    return [torch.cat(found.tensors) for found in heard_of(rule, members, what="point")]


def drifted(
    rule: Rule, steps: Sequence[Sequence[Any]], owns: Sequence[Sequence[int]], *, method: str = "none",
    of_method: Mapping[str, Any] | None = None, base: Any = "momentum", told: Told | None = None, model: Any = None,
    kind: str = "plain",
) -> tuple[list[Member], list[lso.Engine]]:  # fmt: skip
    """Replicas, an engine each, that take these steps on their own micro-batches, and meet before each step of which
    `rule.every` are over; what they hear is settled `rule.overlap` steps later."""
    members, made = [], []
    for _ in owns:
        net = engines.net((), torch.float64) if model is None else model()
        chosen = lso.registry.build(method, **(of_method or {}))
        engine = engines.build(kind, net, chosen, base=base, keep=[rule])
        made.append(engine)
        members.append(Member(engine.space, engine.families[FAMILY].state_dict(), samples=0))
    due: dict[int, list[Any]] = {}
    for t, step in enumerate(steps):
        mine = [[lso.MicroBatch(u, step[u], place=u - own[0]) for u in own] for own in owns]
        if t and t % rule.every == 0:
            for m, engine, units in zip(members, made, mine, strict=True):
                _, m.oracle = lso.attach(engine, None, units)
            due[t + rule.overlap] = heard_of(rule, members, t // rule.every - 1, told=told)
            for m in members:
                m.samples = 0
        if t in due:
            settle(rule, members, due.pop(t))
        for m, engine, units in zip(members, made, mine, strict=True):
            engine.train_batch(units)
            m.samples += sum(len(u.batch[0]) for u in units)
    return members, made
