"""The papers' loops on one process and one copy of the weights, written out plainly: what the sharded runs must equal.

Nothing here comes from the code under test but the random numbers of LPF-SGD, whose definition has a test of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.space.random.noise import block_seed, fill_normal_

Batches = Sequence[tuple[Tensor, Tensor]]
"""The units of one step, in global order."""


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(
        model(batch[0]).float() if batch[0].dtype == torch.bfloat16 else model(batch[0]), batch[1]
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


_before_last: list[Callable[[], None]] = []
"""What is looked at before the last pass of SAM and ASAM, whose `gradient` calls count down to it."""


def gradient(model: nn.Module, units: Batches, share: Callable[[int], float]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of sum_u share(u) L_u."""
    if _before_last:
        _before_last.pop()()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for u, batch in enumerate(units):
        loss = cross_entropy(model, batch) * share(u)
        loss.backward()
        total += loss.item()
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained(model).items()}


def by_samples(units: Batches) -> Callable[[int], float]:
    sizes = [len(x) for x, _ in units]
    return lambda u: sizes[u] / sum(sizes)


def norm(vectors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in vectors))


def at(model: nn.Module, shift: dict[str, Tensor], run: Callable[[], Any]) -> Any:
    """The value of `run()` with the weights moved by `shift`, which is taken back after."""
    saved = {n: p.detach().clone() for n, p in trained(model).items()}
    with torch.no_grad():
        for n, p in trained(model).items():
            p.add_(shift[n])
    out = run()
    with torch.no_grad():
        for n, p in trained(model).items():
            p.copy_(saved[n])
    return out


def none(model: nn.Module, units: Batches, step: int, progress: float, **_: Any) -> tuple[float, dict[str, Tensor]]:
    return gradient(model, units, by_samples(units))


def sam(
    model: nn.Module,
    units: Batches,
    step: int,
    progress: float,
    *,
    rho: float,
    radius: str = "model",
    every: int = 1,
    precondition: str = "none",
    **more: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Foret et al., Algorithm 1; preconditioned by Adam's second moment after a step with g."""
    loss, g = gradient(model, units, by_samples(units))
    if step % every:
        return loss, g
    if precondition != "none":
        q = {n: v / root for (n, v), root in zip(g.items(), adams_root(model, g, **more), strict=True)}
        square = sum(float((v * (v if precondition == "adam" else g[n])).double().sum()) for n, v in q.items())
        e = {n: rho * v / (math.sqrt(square) + 1e-12) for n, v in q.items()}
        return loss, at(model, e, lambda: gradient(model, units, by_samples(units)))[1]
    if radius == "model":
        whole = norm(list(g.values()))
        e = {n: rho * v / (whole + 1e-12) for n, v in g.items()}
    elif radius == "parameter":
        e = {n: rho * v / (norm([v]) + 1e-12) for n, v in g.items()}
    else:
        e = {}
        for n, v in g.items():
            rows = v.reshape(v.shape[0], -1) if v.dim() > 1 else v.reshape(1, -1)
            e[n] = torch.stack([rho * r / (norm([r]) + 1e-12) for r in rows]).reshape(v.shape)
    return loss, at(model, e, lambda: gradient(model, units, by_samples(units)))[1]


def adams_root(
    model: nn.Module, g: dict[str, Tensor], optimizer: torch.optim.Optimizer, clip: float = 0.0, **_: Any
) -> list[Tensor]:
    """What Adam would divide by in a step with g, clipped: sqrt((b2 v + (1 - b2) g^2) / (1 - b2^t)) + 1e-8 (Kingma and
    Ba)."""
    if clip:
        g = {n: v * min(clip / (norm(list(g.values())) + 1e-6), 1.0) for n, v in g.items()}
    [group], out = optimizer.param_groups, []
    b2 = group["betas"][1]
    for n, p in trained(model).items():
        kept = optimizer.state[p]
        v, t = kept.get("exp_avg_sq", torch.zeros_like(p)), float(kept.get("step", 0)) + 1
        out.append(((b2 * v + (1 - b2) * g[n] ** 2) / (1 - b2**t)).sqrt() + 1e-8)
    return out


def asam(
    model: nn.Module, units: Batches, step: int, progress: float, *, rho: float, eta: float, **_: Any
) -> tuple[float, dict[str, Tensor]]:
    """Kwon et al., Algorithm 1, with T = |w| + eta for weights and 1 for biases."""
    loss, g = gradient(model, units, by_samples(units))
    t = {n: p.detach().abs() + eta if "weight" in n else torch.ones_like(p) for n, p in trained(model).items()}
    length = norm([t[n] * v for n, v in g.items()])
    e = {n: rho * t[n] ** 2 * v / (length + 1e-16) for n, v in g.items()}
    return loss, at(model, e, lambda: gradient(model, units, by_samples(units)))[1]


def lpf_sgd(
    model: nn.Module,
    units: Batches,
    step: int,
    progress: float,
    *,
    parts: int,
    gamma: float,
    alpha: float,
    seed: int = 0,
    **_: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Bisla et al., Algorithm 1: one draw a part of the batch."""
    gamma_t = gamma * ((alpha - 1) * (1 - math.cos(math.pi * progress)) / 2 + 1)
    share = by_samples(units)
    total, g = 0.0, {n: torch.zeros_like(p) for n, p in trained(model).items()}
    for m in range(parts):
        first, end = len(units) * m // parts, len(units) * (m + 1) // parts
        e = {}
        for n, p in trained(model).items():
            z = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
            fill_normal_(z, seed=block_seed(seed, step, m), name=n, offset=0)
            rows = p.detach().reshape(p.shape[0], -1) if p.dim() > 1 else p.detach().reshape(1, -1)
            std = gamma_t * torch.stack([r.norm() for r in rows])
            e[n] = (z.reshape(rows.shape) * std[:, None]).reshape(p.shape)
        loss, part = at(model, e, lambda a=first, b=end: gradient(model, units[a:b], lambda u: share(a + u)))
        total += loss
        g = {n: g[n] + part[n] for n in g}
    return total, g


def flat_lora(
    model: nn.Module, units: Batches, step: int, progress: float, *, sigma: float, seed: int = 0, **_: Any
) -> tuple[float, dict[str, Tensor]]:
    """Li et al.: noise on the weights merged with their adapters, taken back after the gradient of the adapters."""
    f = (1 - math.cos(math.pi * progress)) / 2
    saved = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not hasattr(layer, "base_layer"):
                continue
            w, a, b = (m.weight for m in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
            saved[name] = w.clone()
            z = torch.empty(w.numel(), dtype=w.dtype, device=w.device)
            fill_normal_(z, seed=block_seed(seed, step, 0), name=f"{name}.weight", offset=0)
            length = torch.stack([row.norm() for row in w + layer.scaling["default"] * b @ a])
            w.add_(z.view(w.shape) * (f * sigma * length / math.sqrt(w.shape[1]))[:, None])
    out = gradient(model, units, by_samples(units))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name in saved:
                layer.base_layer.weight.copy_(saved[name])
    return out


LOOPS = {"none": none, "sam": sam, "asam": asam, "lpf_sgd": lpf_sgd, "flat_lora": flat_lora}


def run(
    model: nn.Module,
    steps: Sequence[Batches],
    optimizer: torch.optim.Optimizer,
    method: str,
    hyperparameters: dict[str, Any],
    *,
    clip: float = 0.0,
) -> list[float]:
    """The paper's loop over all steps on `model` itself; the losses. Parameters without gradient are left alone."""
    from tests.oracles.sam_family import LOOPS as FAMILY  # which is made of what stands above

    losses, seen = [], 0
    loop, memory = {**LOOPS, **FAMILY}[method], dict[str, Any]()
    total = sum(len(x) for units in steps for x, _ in units)
    for step, units in enumerate(steps):
        look = partial(getattr(optimizer, "look", lambda *_: None), model, units, step)
        if getattr(optimizer, "looks_last", False) and method in ("sam", "asam"):
            _before_last[:] = [look, lambda: None]
        else:
            look()
        loss, g = loop(
            model, units, step, seen / total, **hyperparameters, memory=memory, optimizer=optimizer, clip=clip
        )
        used = {n for n, p in trained(model).items() if p.grad is not None}
        for n, p in trained(model).items():
            p.grad = g[n] if n in used else None
        if clip:
            torch.nn.utils.clip_grad_norm_(list(trained(model).values()), clip)
        optimizer.step()
        memory.get("when stepped", lambda: None)()
        losses.append(loss)
        seen += sum(len(x) for x, _ in units)
    return losses
