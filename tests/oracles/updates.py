"""Update rules as loops over whole parameters, from the papers: what steps on shards must equal."""

from __future__ import annotations

import math
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """You, Gitman, Ginsburg 2017, Algorithm 1; vectors take plain steps."""

    def __init__(self, params: Any, lr: float, momentum: float, trust: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                w, g, decay = float(p.norm()), float(p.grad.norm()), group["weight_decay"]
                ratio = group["trust"] * w / (g + decay * w) if p.dim() > 1 and w > 0 and g > 0 else 1.0
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad + decay * p, alpha=group["lr"] * ratio)
                p.sub_(v)


class LAMB(torch.optim.Optimizer):
    """You et al. 2020, Algorithm 2, phi(z) = min(z, most)."""

    def __init__(self, params: Any, lr: float, weight_decay: float, eps: float, most: float, vectors: bool) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps, "most": most, "vectors": vectors})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        b1, b2 = 0.9, 0.999
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                s.setdefault("m", torch.zeros_like(p))
                s.setdefault("v", torch.zeros_like(p))
                s["t"] = s.get("t", 0) + 1
                s["m"] = b1 * s["m"] + (1 - b1) * p.grad
                s["v"] = b2 * s["v"] + (1 - b2) * p.grad**2
                r = s["m"] / (1 - b1 ** s["t"]) / ((s["v"] / (1 - b2 ** s["t"])).sqrt() + group["eps"])
                r = r + group["weight_decay"] * p
                w, length = min(float(p.norm()), group["most"]), float(r.norm())
                adapts = (group["vectors"] or p.dim() > 1) and w > 0 and length > 0
                p.sub_(r, alpha=group["lr"] * (w / length if adapts else 1.0))


class Both(torch.optim.Optimizer):
    """Two optimizers, each with parameters of its own, as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class Normalised(torch.optim.Optimizer):
    """A matrix steps by its gradient over its length, in bf16, times sqrt(max(1, rows / columns)); a vector by SGD."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim == 2:
                    u = p.grad.bfloat16()
                    longer = math.sqrt(max(1.0, p.size(0) / p.size(1)))
                    p.add_(u / u.norm(), alpha=-group["lr"] * longer)
                else:
                    p.add_(p.grad, alpha=-group["lr"])


def ema(points: list[torch.Tensor], batches: list[int], decay: float) -> torch.Tensor:
    """The mean after these weights; points[0] is where it begins, batches[i] the samples of step i."""
    mean = points[0].double()
    for w, batch in zip(points[1:], batches, strict=True):
        rho = math.pow(decay, batch / batches[0])
        mean = rho * mean + (1 - rho) * w.double()
    return mean


def spaced(points: list[Any], clocks: list[int], first: float, every: int) -> list[Any]:
    """Of the points that a run passes at these samples: the first in each window of `every` samples from `first` on."""
    taken, mark = [], first
    for point, samples in zip(points, clocks, strict=True):
        if samples >= mark:
            taken.append(point)
            while mark <= samples:
                mark += every
    return taken
