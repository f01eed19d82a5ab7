"""Updates that look at the curvature, as loops over whole parameters from the papers and their authors' code.

Nothing here comes from the code under test but the random numbers, whose definition has a test of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.space.random.noise import block_seed, fill_normal_
from tests.oracles.paper_loops import Batches, by_samples, cross_entropy, trained


def signs(name: str, like: Tensor, step: int, seed: int = 0) -> Tensor:
    z = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    fill_normal_(z, seed=block_seed(seed, step, -1), name=name, offset=0)
    return torch.where(z >= 0, 1.0, -1.0).to(like).view(like.shape)


def hessian_products(model: nn.Module, units: Batches, step: int) -> dict[str, Tensor]:
    """z * H z of the mean loss by double backward; zeros for a parameter that takes no part."""
    share, named = by_samples(units), trained(model)
    params, z = list(named.values()), {n: signs(n, p, step) for n, p in named.items()}
    loss = torch.stack([cross_entropy(model, batch) * share(u) for u, batch in enumerate(units)]).sum()
    g = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    along = torch.stack([(own * z[n]).sum() for n, own in zip(named, g, strict=True) if own is not None]).sum()
    products = torch.autograd.grad(along, params, allow_unused=True)
    return {
        n: z[n] * own if own is not None else torch.zeros_like(z[n]) for n, own in zip(named, products, strict=True)
    }


def sampled_gradient(model: nn.Module, units: Batches, step: int, seed: int = 0) -> dict[str, Tensor]:
    """Of the mean loss with labels drawn from the model, micro-batch by micro-batch."""
    share, named = by_samples(units), trained(model)
    losses = []
    for u, (x, _) in enumerate(units):
        logits = model(x)
        with torch.random.fork_rng():
            torch.manual_seed(block_seed(seed, "labels", step, u) & 0x7FFFFFFFFFFFFFFF)
            labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1)[:, 0]
        losses.append(nn.functional.cross_entropy(logits, labels) * share(u))
    g = torch.autograd.grad(torch.stack(losses).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if own is None else own for (n, p), own in zip(named.items(), g, strict=True)}


class Looking(torch.optim.Optimizer):
    """`paper_loops.run` lets it look: at w before the passes, or where the last pass is (`looks_last`)."""

    looks_last = False
    every: int

    def __init__(self, params: Any, **options: Any) -> None:
        self.every = options.pop("every", 1)
        super().__init__(params, options)

    def look(self, model: nn.Module, units: Batches, step: int) -> None:
        if step % self.every == 0:
            self.see(model, units, step)

    def see(self, model: nn.Module, units: Batches, step: int) -> None:
        """Keep what is seen."""
        for n, seen in hessian_products(model, units, step).items():
            self.saw(self.state[trained(model)[n]], seen)

    def saw(self, state: dict[str, Any], seen: Tensor) -> None: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                state["t"] = state.get("t", 0) + 1
                state["m"] = group["betas"][0] * state.get("m", 0.0) + (1 - group["betas"][0]) * p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * self.direction(state, group))

    def direction(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class SophiaH(Looking):
    """Liu et al., Algorithm 3 with Hutchinson's estimator."""

    def saw(self, state: dict[str, Any], seen: Tensor) -> None:
        b2 = self.param_groups[0]["betas"][1]
        state["h"] = b2 * state.get("h", 0.0) + (1 - b2) * seen

    def direction(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        below = torch.maximum(group["gamma"] * state["h"], torch.full_like(state["h"], 1e-12))
        return torch.clip(state["m"] / below, -1, 1)


class SophiaG(Looking):
    """The authors' step: sign(m) min(|m| / (rho bs h + 1e-15), 1), bs samples in the batch."""

    def see(self, model: nn.Module, units: Batches, step: int) -> None:
        self.bs, b2 = sum(len(x) for x, _ in units), self.param_groups[0]["betas"][1]
        for n, g in sampled_gradient(model, units, step).items():
            state = self.state[trained(model)[n]]
            state["h"] = b2 * state.get("h", 0.0) + (1 - b2) * g * g

    def direction(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        ratio = (state["m"].abs() / (group["rho"] * self.bs * state["h"] + 1e-15)).clamp(None, 1)
        return state["m"].sign() * ratio


class AdaHessian(Looking):
    """The authors' vision code: |Hz|, its mean over a kernel, in place of Adam's gradient."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"betas": (0.9, 0.999), **options})

    def saw(self, state: dict[str, Any], seen: Tensor) -> None:
        b2, d = self.param_groups[0]["betas"][1], seen.abs()
        if d.dim() == 4:
            d = d.mean(dim=[2, 3], keepdim=True)
        state["v"] = b2 * state.get("v", torch.zeros_like(seen)) + (1 - b2) * d * d

    def direction(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        (b1, b2), t = group["betas"], state["t"]
        return state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + group["eps"])


class SASSHA(Looking):
    """The authors' file, with hessian_power 1/2: its bias correction is that of the last step that looked."""

    looks_last = True

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"betas": (0.9, 0.999), **options})

    def saw(self, state: dict[str, Any], seen: Tensor) -> None:
        b2 = self.param_groups[0]["betas"][1]
        state["d"] = b2 * state.get("d", 0.0) + (1 - b2) * seen.abs()
        state["correction"] = (1 - b2 ** (state.get("t", 0) + 1)) ** 0.5

    def direction(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return (
            state["m"]
            / (1 - group["betas"][0] ** state["t"])
            / (state["d"] ** 0.5 / state["correction"] + group["eps"])
        )
