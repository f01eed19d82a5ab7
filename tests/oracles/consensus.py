"""The rules of consensus on whole models in one process, written out from their papers: one flat vector a replica."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.paper_loops import LOOPS, by_samples, gradient, trained
from tests.oracles.sam_family import LOOPS as FAMILY

Steps = Sequence[Sequence[tuple[Tensor, Tensor]]]


class Replica:
    """A model, its optimizer, and what its rule has told it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.losses: list[float] = []
        self.samples = 0
        self.memory: dict[str, Any] = {}
        self.of_method: dict[str, Any] = {}

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
    a = 1 / (1 + max(degree, default=0))
    before = [r.x.clone() for r in all_]
    for i, r in enumerate(all_):
        near = sorted(j for e in edges if i in e for j in e if j != i)
        if near:
            y = (1 - degree[i] * a) * before[i] + a * sum(before[j] for j in near)
            best = before[min([i, *near], key=lambda j: all_[j].losses[-1])]
            most = before[max([i, *near], key=lambda j: degree[j])]
            y = (1 - c1 - c2) * y + c1 * best + c2 * most
            r.x = y - p1 * (y - best) - p2 * (y - most)


def parle(all_: list[Replica], number: int, coming: Any, **_: Any) -> None:
    mean = sum(r.x for r in all_) / len(all_)
    for r in all_:
        r.memory["mean"] = mean


def streaming_diloco(
    all_: list[Replica], number: int, coming: Any, *, lr: float, momentum: float, alpha: float,
    places: list[list[range]], **_: Any,
) -> Callable[[], None]:  # fmt: skip
    """What of a flat vector each fragment is, is given; what settles later is given back."""
    here = torch.tensor([i for run in places[number % len(places)] for i in run])
    old, v = all_[0].memory["old"], all_[0].memory["v"]
    total = sum(r.samples for r in all_)
    delta = old[here] - sum(r.x[here] * (r.samples / total) for r in all_)

    def settle() -> None:
        v[here] = momentum * v[here] + delta
        old[here] = old[here] - lr * (delta + momentum * v[here])
        for r in all_:
            x = r.x
            x[here] = alpha * x[here] + (1 - alpha) * old[here]
            r.x = x

    return settle


def sparseloco(
    all_: list[Replica], number: int, coming: Any, *, k: int, chunk: int, lr: float = 1.0, decay: float = 0.95,
    places: Sequence[Sequence[int]] | None = None,
) -> None:  # fmt: skip
    """In all bits: what is left of a chunk are the elements that are not among its k largest. Chunks are of the
    elements of each of the `places` (None: one holds all)."""
    old = all_[0].memory["old"]
    total = sum(r.samples for r in all_)
    new = old.clone()
    for r in all_:
        e = decay * r.memory.get("e", torch.zeros_like(old)) + lr * (old - r.x)
        sent = torch.zeros_like(e)
        for place in places or [range(len(e))]:
            for begin in range(0, len(place), chunk):
                for i in sorted(place[begin : begin + chunk], key=lambda i: -abs(float(e[i])))[:k]:
                    sent[i] = e[i]
        r.memory["e"] = e - sent
        new -= sent * (r.samples / total)
    all_[0].memory["old"] = new
    for r in all_:
        r.x = new.clone()


RULES: dict[str, Callable[..., Callable[[], None] | None]] = {
    "local_sgd": local_sgd, "easgd": easgd, "dppf": dppf, "diloco": diloco, "lsgd": lsgd, "al_dsgd": al_dsgd,
    "eamsgd": easgd, "lsam": easgd, "muloco": diloco, "parle": parle, "streaming_diloco": streaming_diloco,
    "sparseloco": sparseloco,
    "mgrawa": lambda *a, **k: grawa(*a, layers=False, **k), "lgrawa": lambda *a, **k: grawa(*a, layers=True, **k),
}  # fmt: skip


def drifted(
    replicas: list[Replica], steps: Steps, owns: Sequence[range], rule: str, every: int, hyper: dict[str, Any],
    method: str, of_method: dict[str, Any], overlap: int = 0,
) -> None:  # fmt: skip
    """Each replica takes each step on its own units; before each step of which `every` are over they meet."""
    first = replicas[0]
    first.memory |= {"centre": first.x.clone(), "old": first.x.clone(), "v": torch.zeros_like(first.x)}
    for r in replicas:
        r.memory |= {"mean": first.x.clone(), "leader": first.x.clone()}
    due: dict[int, Callable[[], None]] = {}
    for t, step in enumerate(steps):
        mine = [[step[u] for u in own] for own in owns]
        if t and t % every == 0:
            later = RULES[rule](replicas, t // every - 1, mine, **hyper)
            for r in replicas:
                r.samples = 0
            if later is not None:
                due[t + overlap] = later
        if t in due:
            due.pop(t)()
        for r, units in zip(replicas, mine, strict=True):
            _step(r, units, t, rule, every, hyper, method, of_method)
            r.samples += sum(len(x) for x, _ in units)


def _step(
    r: Replica, units: Any, t: int, rule: str, every: int, hyper: dict[str, Any], method: str, of_method: dict[str, Any]
) -> None:
    loop = {**LOOPS, **FAMILY}[method]
    loss, g = loop(r.model, units, t, 0.0, **of_method, memory=r.of_method, optimizer=r.optimizer, clip=0.0)
    flat = torch.cat([v.reshape(-1) for v in g.values()])
    if rule == "parle":
        flat = flat + min(hyper["rho0"] * (1 + hyper["rho1"]) ** t, 10.0) * (r.x - r.memory["mean"])
    for p, part in zip(trained(r.model).values(), flat.split([v.numel() for v in g.values()]), strict=True):
        p.grad = part.view(p.shape).clone()
    if rule == "lsgd":
        share = hyper.get("prox", 0.1) / (every * hyper.get("global_every", 1))
        r.x = (1 - share) * r.x + share * r.memory["leader"]
    r.optimizer.step()
    r.losses.append(loss)
    assert math.isfinite(loss)
