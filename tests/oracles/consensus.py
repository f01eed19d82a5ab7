"""The rules of consensus on whole models in one process, written out from their papers: one flat vector a replica."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.paper_loops import by_samples, gradient, run

Steps = Sequence[Sequence[tuple[Tensor, Tensor]]]


class Replica:
    """A model, its optimizer, and what its rule has told it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.losses: list[float] = []
        self.samples = 0
        self.memory: dict[str, Any] = {}

    @property
    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    @x.setter
    def x(self, values: Tensor) -> None:
        with torch.no_grad():
            at = 0
            for p in self.model.parameters():
                p.copy_(values[at : at + p.numel()].view(p.shape))
                at += p.numel()


def local_sgd(all_: list[Replica], number: int, coming: Any, *, pull: float = 1.0) -> None:
    total = sum(r.samples for r in all_)
    mean = sum(r.x * (r.samples / total) for r in all_)
    for r in all_:
        r.x = (1 - pull) * r.x + pull * mean


def easgd(all_: list[Replica], number: int, coming: Any, *, beta: float) -> None:
    centre = all_[0].memory["centre"]
    apart = [r.x - centre for r in all_]
    for r, d in zip(all_, apart, strict=True):
        r.x = r.x - beta / len(all_) * d
    all_[0].memory["centre"] = centre + beta / len(all_) * sum(apart)


def dppf(all_: list[Replica], number: int, coming: Any, *, pull: float, push: float) -> None:
    mean = sum(r.x for r in all_) / len(all_)
    for r in all_:
        r.x = r.x + pull * (mean - r.x) + push * (r.x - mean) / (r.x - mean).norm()


def diloco(all_: list[Replica], number: int, coming: Any, *, lr: float, momentum: float) -> None:
    old, v = all_[0].memory["old"], all_[0].memory["v"]
    total = sum(r.samples for r in all_)
    delta = old - sum(r.x * (r.samples / total) for r in all_)
    v = momentum * v + delta
    old = old - lr * (delta + momentum * v)
    all_[0].memory |= {"old": old, "v": v}
    for r in all_:
        r.x = old.clone()


def lsgd(
    all_: list[Replica], number: int, coming: Any, *, pull: float, window: int = 10, group: int = 1,
    global_every: int = 1, prox: float = 0.0,
) -> None:  # fmt: skip
    everywhere = (number + 1) % global_every == 0
    mean = [sum(r.losses[-window:]) / len(r.losses[-window:]) for r in all_]
    before = [r.x.clone() for r in all_]
    for i, r in enumerate(all_):
        among = [j for j in range(len(all_)) if everywhere or j // group == i // group]
        leader = min(among, key=lambda j: (mean[j], j))
        r.x = before[i] + pull * (before[leader] - before[i])
        if everywhere:
            r.memory["leader"] = before[leader]


def grawa(
    all_: list[Replica], number: int, coming: Any, *, layers: bool, pull: float = 0.5, decay: float = 0.9**8
) -> None:
    hats = []
    for r, units in zip(all_, coming, strict=True):
        _, g = gradient(r.model, units, by_samples(units))
        norms = torch.stack([t.double().norm() for t in g.values()])
        n = norms if layers else norms.sum().reshape(1)
        r.memory["A"] = decay * r.memory.get("A", 0.0) + (1 - decay) * n
        hats.append(r.memory["A"] / (1 - decay ** (number + 1)))
    inverse = torch.stack([1 / h for h in hats])
    weights = inverse / inverse.sum(0)
    sizes = [p.numel() for p in all_[0].model.parameters()]
    mean = torch.zeros_like(all_[0].x)
    for r, w in zip(all_, weights, strict=True):
        each = w if layers else w.expand(len(sizes))
        mean += r.x * torch.cat(
            [torch.full((n,), float(v), dtype=mean.dtype) for n, v in zip(sizes, each, strict=True)]
        )
    for r in all_:
        r.x = (1 - pull) * r.x + pull * mean


def al_dsgd(
    all_: list[Replica], number: int, coming: Any, *, rounds: list[list[tuple[int, int]]], c1: float, c2: float,
    p1: float, p2: float, **_: Any,
) -> None:  # fmt: skip
    """On graphs that are given, one for each exchange."""
    edges = rounds[number % len(rounds)]
    degree = [sum(i in e for e in edges) for i in range(len(all_))]
    a = 1 / (1 + max(degree))
    before = [r.x.clone() for r in all_]
    for i, r in enumerate(all_):
        near = sorted(j for e in edges if i in e for j in e if j != i)
        if near:
            y = (1 - degree[i] * a) * before[i] + a * sum(before[j] for j in near)
            best = before[min([i, *near], key=lambda j: all_[j].losses[-1])]
            most = before[max([i, *near], key=lambda j: degree[j])]
            y = (1 - c1 - c2) * y + c1 * best + c2 * most
            r.x = y - p1 * (y - best) - p2 * (y - most)


RULES: dict[str, Callable[..., None]] = {
    "local_sgd": local_sgd, "easgd": easgd, "dppf": dppf, "diloco": diloco, "lsgd": lsgd, "al_dsgd": al_dsgd,
    "eamsgd": easgd, "lsam": easgd, "muloco": diloco,
    "mgrawa": lambda *a, **k: grawa(*a, layers=False, **k), "lgrawa": lambda *a, **k: grawa(*a, layers=True, **k),
}  # fmt: skip


def trained(
    replicas: list[Replica], steps: Steps, owns: Sequence[range], rule: str, tau: int, hyper: dict[str, Any],
    method: str, of_method: dict[str, Any],
) -> None:  # fmt: skip
    """Each replica takes each step on its own units; before step tau, 2 tau … they meet."""
    first = replicas[0]
    first.memory |= {"centre": first.x.clone(), "old": first.x.clone(), "v": torch.zeros_like(first.x)}
    for t, step in enumerate(steps):
        mine = [[step[u] for u in own] for own in owns]
        if t and t % tau == 0:
            RULES[rule](replicas, t // tau - 1, mine, **hyper)
            for r in replicas:
                r.samples = 0
        for r, units in zip(replicas, mine, strict=True):
            move = _prox(r, tau, hyper) if rule == "lsgd" else None
            [loss] = run(r.model, [units], _Moving(r.optimizer, move), method, of_method)
            r.losses.append(loss)
            r.samples += sum(len(x) for x, _ in units)
        assert all(math.isfinite(r.losses[-1]) for r in replicas)


def _prox(r: Replica, tau: int, hyper: dict[str, Any]) -> Callable[[], None] | None:
    share = hyper.get("prox", 0.0) / (tau * hyper.get("global_every", 1))
    if not share or "leader" not in r.memory:
        return None

    def move() -> None:
        r.x = (1 - share) * r.x + share * r.memory["leader"]

    return move


class _Moving:
    """An optimizer before whose step the weights are moved."""

    def __init__(self, base: torch.optim.Optimizer, move: Callable[[], None] | None) -> None:
        self._base, self._move = base, move

    def step(self) -> None:
        if self._move is not None:
            self._move()
        self._base.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
