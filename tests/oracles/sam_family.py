"""The loops of SAM's family, RWP and Entropy-SGD, each from its paper, as `paper_loops` has the first ones.

Each takes (model, units, step, progress) and hyper-parameters, `memory` that lives from step to step, and the base
`optimizer`; it returns the loss and the gradient to step with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.space.random.noise import block_seed, fill_normal_
from tests.oracles.paper_loops import Batches, at, by_samples, gradient, norm, trained

Named = dict[str, Tensor]
Answer = tuple[float, Named]


def whole(model: nn.Module, units: Batches) -> Answer:
    return gradient(model, units, by_samples(units))


def part(model: nn.Module, units: Batches, number: int, of: int) -> tuple[float, Answer]:
    """The part's share of the batch, its own mean loss and gradient."""
    first, end = len(units) * number // of, len(units) * (number + 1) // of
    mine = units[first:end]
    return sum(len(x) for x, _ in mine) / sum(len(x) for x, _ in units), whole(model, mine)


def scaled(d: Named, length: float) -> Named:
    n = norm(list(d.values()))
    return {k: length * v / (n + 1e-12) for k, v in d.items()}


def dot(a: Named, b: Named) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in a)


def mixed(a: float, x: Named, b: float, y: Named) -> Named:
    return {n: a * x[n] + b * y[n] for n in x}


def up(model: nn.Module, units: Batches, e: Named) -> Answer:
    return at(model, e, lambda: whole(model, units))


def gsam(model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, alpha: float, **_: Any) -> Answer:
    """Zhuang et al., Algorithm 1."""
    loss, g = whole(model, units)
    _, s = up(model, units, scaled(g, rho))
    perpendicular = mixed(1, g, -dot(g, s) / dot(s, s), s)
    return loss, mixed(1, s, -alpha, perpendicular)


def looksam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, k: int, alpha: float,
    memory: dict[str, Any], **_: Any,
) -> Answer:  # fmt: skip
    """Liu et al., Algorithm 1, with the whole model's lengths."""
    loss, g = whole(model, units)
    if step % k:
        return loss, mixed(1, g, alpha * norm(list(g.values())), memory["v"])
    _, s = up(model, units, scaled(g, rho))
    v = mixed(1, s, -dot(s, g) / dot(g, g), g)
    memory["v"] = {n: t / norm(list(v.values())) for n, t in v.items()}
    return loss, s


def friendly_sam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, sigma: float, decay: float,
    memory: dict[str, Any], **_: Any,
) -> Answer:  # fmt: skip
    """Li et al., Algorithm 1, as the authors' code: the mean of before is subtracted."""
    loss, g = whole(model, units)
    old = memory.get("m")
    d = g if old is None else mixed(1, g, -sigma, old)
    memory["m"] = g if old is None else mixed(decay, old, 1 - decay, g)
    return loss, up(model, units, scaled(d, rho))[1]


def wsam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, gamma: float, decouple: bool,
    optimizer: torch.optim.Optimizer, **_: Any,
) -> Answer:  # fmt: skip
    """Yue et al., Algorithm 2 (coupled) and 1, whose term moves the weights before the base's step."""
    loss, g = whole(model, units)
    _, s = up(model, units, scaled(g, rho))
    a = gamma / (1 - gamma)
    if not decouple:
        return loss, mixed(1 - a, g, a, s)
    lr = optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        for n, p in trained(model).items():
            p.sub_(lr * a * (s[n] - g[n]))
    return loss, g


def momentum_sam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, optimizer: torch.optim.Optimizer,
    **_: Any,
) -> Answer:  # fmt: skip
    """Becker et al.: one gradient, at w - rho v / ||v||."""
    key = "exp_avg" if isinstance(optimizer, torch.optim.AdamW) else "momentum_buffer"
    v = {n: optimizer.state[p].get(key, torch.zeros_like(p)) for n, p in trained(model).items()}
    return up(model, units, scaled(v, -rho))


def m_sam(model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, parts: int, **_: Any) -> Answer:
    """Foret et al., section 4.1: each part steps up by its own gradient."""
    total, loss = {n: torch.zeros_like(p) for n, p in trained(model).items()}, 0.0
    for j in range(parts):
        share, (value, g) = part(model, units, j, parts)
        _, (_, s) = at(model, scaled(g, rho), lambda j=j: part(model, units, j, parts))
        loss, total = loss + share * value, mixed(1, total, share, s)
    return loss, total


def ae_sam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, decay: float, lambda1: float,
    lambda2: float, memory: dict[str, Any], **_: Any,
) -> Answer:  # fmt: skip
    """Jiang et al., Algorithm 1."""
    loss, g = whole(model, units)
    n = norm(list(g.values())) ** 2
    mean = decay * memory.get("mean", 0.0) + (1 - decay) * n
    variance = decay * memory.get("variance", math.exp(-10)) + (1 - decay) * (n - mean) ** 2
    memory.update(mean=mean, variance=variance)
    c = progress * lambda1 + (1 - progress) * lambda2
    return (loss, up(model, units, scaled(g, rho))[1]) if n >= mean + c * math.sqrt(variance) else (loss, g)


def normal(model: nn.Module, step: int, draw: int, seed: int = 0) -> Named:
    """Our noise, whose definition has a test of its own."""
    out = {}
    for n, p in trained(model).items():
        z = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
        out[n] = fill_normal_(z, seed=block_seed(seed, step, draw), name=n, offset=0).view(p.shape)
    return out


def random_sam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, seed: int = 0, **_: Any
) -> Answer:
    return up(model, units, scaled(normal(model, step, 0, seed), rho))


def functional_sam(model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, **_: Any) -> Answer:
    """Singh et al.: the gradient of the logits is that at w, the Jacobian that at w + e."""
    share = by_samples(units)
    loss, g = whole(model, units)
    us = []
    for u, (x, y) in enumerate(units):
        z = model(x).detach().requires_grad_()
        (nn.functional.cross_entropy(z, y) * share(u)).backward()
        us.append(z.grad)

    def pull() -> Named:
        model.zero_grad(set_to_none=True)
        for u, (x, _) in zip(us, units, strict=True):
            model(x).backward(u)
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained(model).items()}

    return loss, at(model, scaled(g, rho), pull)


def rwp(
    model: nn.Module, units: Batches, step: int, progress: float, *, gamma: float, alpha: float, seed: int = 0,
    **_: Any,
) -> Answer:  # fmt: skip
    """Li et al.: half 0 at noisy weights, half 1 at the weights."""
    e = {}
    for n, z in normal(model, step, 0, seed).items():
        w = trained(model)[n].detach()
        rows = w.reshape(w.shape[0], -1) if w.dim() > 1 else w.reshape(1, -1)
        e[n] = (z.reshape(rows.shape) * gamma * torch.stack([r.norm() for r in rows])[:, None]).reshape(w.shape)
    share0, (loss0, g0) = at(model, e, lambda: part(model, units, 0, 2))
    share1, (loss1, g1) = part(model, units, 1, 2)
    return share0 * loss0 + share1 * loss1, mixed(alpha, g0, 1 - alpha, g1)


def entropy_sgd(
    model: nn.Module, units: Batches, step: int, progress: float, *, inner_steps: int, gamma0: float, gamma1: float,
    noise: float, inner_lr: float, inner_momentum: float, average: float, batch: str = "parts", seed: int = 0,
    **_: Any,
) -> Answer:  # fmt: skip
    """Chaudhari et al., Algorithm 1, as the authors' code: Nesterov inside, constants, outer gradient w - mean."""
    params = trained(model)
    start = {n: p.detach().clone() for n, p in params.items()}
    mean = {n: t.clone() for n, t in start.items()}
    v = {n: torch.zeros_like(t) for n, t in start.items()}
    gamma, losses = min(gamma0 * (1 + gamma1) ** step, 1.0), []  # bounded as Parle's, of the same authors
    for number in range(inner_steps):
        share, (loss, g) = part(model, units, number, inner_steps) if batch == "parts" else (1.0, whole(model, units))
        losses.append((share, loss))
        z = normal(model, step, number, seed)
        with torch.no_grad():
            for n, p in params.items():
                v[n] = inner_momentum * v[n] + g[n]
                d = g[n] + inner_momentum * v[n]
                d = d - gamma * (start[n] - p) + noise / math.sqrt(0.5 * inner_lr) * z[n]
                p.sub_(inner_lr * d)
                mean[n] = average * mean[n] + (1 - average) * p
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(start[n])
    first = losses[0][1] if batch == "whole" else sum(s * loss for s, loss in losses)
    return first, {n: start[n] - mean[n] for n in start}


def sampa(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, lam: float, memory: dict[str, Any],
    optimizer: torch.optim.Optimizer, **_: Any,
) -> Answer:  # fmt: skip
    """Xie et al., Algorithm 1, on the step's own batch; y' by SGD with momentum and decay as torch has it."""
    loss = None
    if not memory:
        loss, memory["h"] = whole(model, units)
    there, s = up(model, units, scaled(memory["h"], rho))
    group, d = optimizer.param_groups[0], {}
    for n, p in trained(model).items():
        g = memory["h"][n] + group["weight_decay"] * p.detach()
        buffer = optimizer.state[p].get("momentum_buffer")
        v = g if buffer is None else group["momentum"] * buffer + g
        d[n] = -group["lr"] * (v if group["momentum"] else g)
    _, memory["h"] = up(model, units, d)
    return there if loss is None else loss, mixed(1 - lam, s, lam, memory["h"])


def esam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, beta: float, gamma: float,
    seed: int = 0, **_: Any,
) -> Answer:  # fmt: skip
    """Du et al., Algorithm 1: some tensors go up, and the samples whose losses rise most give the gradient."""

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.cat([nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in units])

    loss, g = whole(model, units)
    before, draw = losses(), random.Random(block_seed(seed, "esam", step))
    taken = {n for n in g if draw.random() < beta} or set(g)
    length = norm([g[n] for n in taken])
    e = {n: rho / beta * v / (length + 1e-7) if n in taken else torch.zeros_like(v) for n, v in g.items()}

    def hurt() -> Named:
        rise = losses() - before
        most = rise.argsort(descending=True, stable=True)[: max(1, round(gamma * len(rise)))]
        x, y = torch.cat([x for x, _ in units])[most], torch.cat([y for _, y in units])[most]
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained(model).items()}

    return loss, at(model, e, hurt)


def nbar(
    model: nn.Module, units: Batches, step: int, progress: float, *, alpha: dict[str, float],
    optimizer: torch.optim.Optimizer, **_: Any,
) -> Answer:  # fmt: skip
    """Li et al., Algorithm 2, on peft's factors."""
    loss, g = whole(model, units)
    a = (alpha["start"] + progress * (alpha["end"] - alpha["start"])) * optimizer.param_groups[0]["lr"]
    params = trained(model)
    with torch.no_grad():
        for n in [n for n in params if ".lora_A." in n]:
            m = n.replace(".lora_A.", ".lora_B.")
            sign = 1 if g[n].norm() >= g[m].norm() else -1
            params[n].mul_(1 + sign * a)
            params[m].mul_(1 - sign * a)
    return loss, g


def length_of(model: nn.Module) -> float:
    """sqrt(sum ||s B2 A2||_F^2) of the adapter called adversary, from the whole products."""
    layers: list[Any] = [layer for layer in model.modules() if "adversary" in getattr(layer, "lora_A", ())]
    factors = [(x.scaling["adversary"], x.lora_B["adversary"].weight, x.lora_A["adversary"].weight) for x in layers]
    return norm([s * b.detach().double() @ a.detach().double() for s, b, a in factors])


def bi_lora(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, memory: dict[str, Any], **_: Any
) -> Answer:  # fmt: skip
    """Liu et al., Algorithm 1, on peft's factors: the second adapter goes up, and is cut to length rho."""
    loss, g = whole(model, units)

    def cut() -> None:
        c = length_of(model)
        if c > rho:
            with torch.no_grad():
                for n, p in trained(model).items():
                    if ".adversary." in n:
                        p.mul_(math.sqrt(rho / c))

    memory["when stepped"] = cut
    return loss, {n: -t if ".adversary." in n else t for n, t in g.items()}


LOOPS: dict[str, Callable[..., Answer]] = {
    f.__name__: f
    for f in (
        gsam, looksam, friendly_sam, wsam, momentum_sam, m_sam, ae_sam, random_sam, functional_sam, rwp, entropy_sgd,
        sampa, esam, nbar, bi_lora,
    )
}  # fmt: skip
