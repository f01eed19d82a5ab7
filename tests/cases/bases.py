"""Base optimizers of a user's own, and what becomes of them on every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import elastic_lsopt as lso
from tests.cases import engines
from tests.oracles import paper_loops


class Lars(torch.optim.Optimizer):
    """Layer-wise rate: g |w| / |g|, as a user writes it (You, Gitman, Ginsburg 2017)."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad * self.ratio(p, p.grad), alpha=-group["lr"])

    def ratio(self, w: Tensor, g: Tensor) -> Tensor:
        return w.norm() / (g.norm() + 1e-9)


class LocalLars(Lars):
    """… who takes the norm of what this rank holds."""

    def ratio(self, w: Tensor, g: Tensor) -> Tensor:
        w, g = (t.to_local() if hasattr(t, "to_local") else t for t in (w, g))  # type: ignore[attr-defined]
        return (w.norm() / (g.norm() + 1e-9)).item()  # type: ignore[return-value]


class Signs(Lars):
    """Element by element, and on nobody's list."""

    def ratio(self, w: Tensor, g: Tensor) -> Tensor:
        return 1 / (g.abs() + 1)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lars": Lars, "local_lars": LocalLars, "signs": Signs, "adafactor": torch.optim.Adafactor,
    "lbfgs": torch.optim.LBFGS,
}  # fmt: skip


def trained(kind: str, base: str) -> dict[str, Any]:
    """What the engine says of the base; else its loss after three steps, beside one process's plain loop."""
    model = engines.net()
    plain = copy.deepcopy(model)
    steps = engines.batches(4, dist.get_world_size(), size=4)
    try:
        engine = engines.build(kind, model, lso.Plain(), base=BASES[base])
    except lso.UserError as error:
        return {"said": f"{type(error).__name__}: {error}"}
    for units in steps[:3]:
        engine.train_batch(engines.mine(units))
    loss = engine.evaluate([engines.mine(steps[3])])
    engines.close(engine)
    return {"said": "", "loss": loss, "plain": _plainly(plain, base, steps)}


def _plainly(model: torch.nn.Module, base: str, steps: Sequence[Any]) -> float:
    optimizer = BASES[base]([p for p in model.parameters() if p.requires_grad])
    for units in steps[:3]:
        _, gradient = paper_loops.gradient(model, units, paper_loops.by_samples(units))
        for name, p in paper_loops.trained(model).items():
            p.grad = gradient[name]
        optimizer.step()
    with torch.no_grad():
        return sum(paper_loops.cross_entropy(model, unit).item() for unit in steps[3]) / len(steps[3])
