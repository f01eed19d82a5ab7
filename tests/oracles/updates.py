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


class SOAP(torch.optim.Optimizer):
    """The authors' file, with its defaults; decompositions in fp32."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, every: int = 10, most: int = 10_000, eps: float = 1e-8
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "every": every, "most": most, "eps": eps}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        for p in group["params"]:
            if p.grad is not None:
                self._step(p, p.grad, self.state[p], **{k: v for k, v in group.items() if k != "params"})

    def _step(
        self, p: Any, g: torch.Tensor, s: dict[str, Any], lr: float, weight_decay: float, every: int, most: int,
        eps: float, **_: Any,
    ) -> None:  # fmt: skip
        b1 = b2 = 0.95
        if not s:
            s.update(t=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
            sides = [n if g.dim() > 1 and n <= most else 0 for n in g.shape]
            s["GG"] = [torch.zeros(n, n).to(g) if n else None for n in sides]
            self._grams(s, g, b2)
            s["Q"] = [None if gram is None else self._eigenvectors(gram) for gram in s["GG"]]
            return
        s["t"] += 1
        there = self._project(g, s["Q"])
        s["m"] = b1 * s["m"] + (1 - b1) * there
        s["v"] = b2 * s["v"] + (1 - b2) * there**2
        step = self._project(s["m"] / (s["v"].sqrt() + eps), [None if q is None else q.T for q in s["Q"]])
        p.sub_(lr * (1 - b2 ** s["t"]) ** 0.5 / (1 - b1 ** s["t"]) * step)
        p.sub_(lr * weight_decay * p)
        m = self._project(s["m"], [None if q is None else q.T for q in s["Q"]])
        self._grams(s, g, b2)
        if s["t"] % every == 0:
            for side, (gram, q) in enumerate(zip(s["GG"], s["Q"], strict=True)):
                if gram is not None:
                    ahead = gram @ q
                    order = torch.einsum("ij,ij->j", q, ahead).argsort(descending=True)
                    s["v"] = s["v"].index_select(side, order)
                    s["Q"][side] = torch.linalg.qr(ahead[:, order].float())[0].to(g)
        s["m"] = self._project(m, s["Q"])

    @staticmethod
    def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(gram.float() + 1e-30 * torch.eye(len(gram)))[1].flip(1).to(gram)

    @staticmethod
    def _grams(s: dict[str, Any], g: torch.Tensor, b2: float) -> None:
        for side, gram in enumerate(s["GG"]):
            if gram is not None:
                others = [i for i in range(g.dim()) if i != side]
                gram.lerp_(torch.tensordot(g, g, dims=[others, others]), 1 - b2)  # type: ignore[arg-type]

    @staticmethod
    def _project(t: torch.Tensor, qs: Any) -> torch.Tensor:
        for side, q in enumerate(qs):
            if q is not None:
                t = torch.tensordot(t, q, dims=[[side], [0]]).movedim(-1, side)  # type: ignore[arg-type]
        return t


class AdaptiveMemory(torch.optim.Optimizer):
    """Adaptive memory momentum, 2025: SGD's form with one beta for all parameters, AdamW's with one for each."""

    def __init__(self, params: Any, form: str, lr: float, weight_decay: float, lam: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.form, self.lam = form, lam

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        (self._sgd if self.form == "sgd" else self._adamw)(params, group["lr"], group["weight_decay"])

    def _sgd(self, params: list[Any], lr: float, decay: float) -> None:
        g = [p.grad + decay * p for p in params]
        d = [self.state[p].setdefault("d", own.clone()) for p, own in zip(params, g, strict=True)]
        flat_g, flat_d = (torch.cat([t.reshape(-1) for t in many]) for many in (g, d))
        above = (1 + self.lam) * (flat_g @ flat_d) - (flat_d - flat_g) @ (flat_g + self.lam * flat_d)
        below = float((flat_d - flat_g).square().sum())
        beta = min(max(float(above) / below, 0.0), 0.9) if below else 0.0
        for p, own, kept in zip(params, g, d, strict=True):
            kept.copy_(((beta + self.lam) * kept + (1 - beta) * own) / (1 + self.lam))
            p.sub_(lr * kept)

    def _adamw(self, params: list[Any], lr: float, decay: float) -> None:
        b1, b2, lam = 0.9 - 0.1 * self.lam, 0.999, self.lam
        for p in params:
            s, g = self.state[p], p.grad
            if not s:
                s.update(d=torch.zeros_like(p), v=torch.zeros_like(p), t=0, product=1.0)
            s["t"] += 1
            s["v"] = b2 * s["v"] + (1 - b2) * g**2
            big = (1 - b1 * s["product"]) * ((s["v"] / (1 - b2 ** s["t"])).sqrt() + 1e-8)
            metric, d = 1 / (big * (1 + lam * big)), s["d"]
            if s["t"] == 1:
                beta = b1
            else:
                gap = lr * float((g * (d / big + decay * p)).sum())
                above = (1 + decay * lr) * gap / lr - float(((d - g) * (g + lam * big * d) * metric).sum())
                above -= decay * float((p * (d - g)).sum())
                below = float(((d - g) ** 2 * metric).sum())
                beta = min(max(above / below, 0.0), b1) if below else 0.0
            s["d"] = ((1 - beta) * g + (lam * big + beta) * d) / (1 + lam * big)
            p.mul_(1 - decay * lr).sub_(lr * s["d"] / big)
            s["product"] *= beta


def spaced(points: list[Any], clocks: list[int], first: float, every: int) -> list[Any]:
    """Of the points that a run passes at these samples: the first in each window of `every` samples from `first` on."""
    taken, mark = [], first
    for point, samples in zip(points, clocks, strict=True):
        if samples >= mark:
            taken.append(point)
            while mark <= samples:
                mark += every
    return taken
