"""Quadratic losses as models, and the flatness measures of the small net on any engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.flatness.filter_norms import filter_norms, normalised
from elastic_lsopt.probes.flatness.fisher_rao import fisher_rao
from elastic_lsopt.probes.flatness.gradient_norm import gradient_norm
from elastic_lsopt.probes.flatness.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.flatness.logit_share import logit_share
from elastic_lsopt.probes.flatness.lpf import lpf
from elastic_lsopt.probes.flatness.mean_valley import mean_valley
from elastic_lsopt.probes.flatness.pac_bayes import pac_bayes
from elastic_lsopt.probes.flatness.sam_sharpness import sam_sharpness
from elastic_lsopt.probes.flatness.shannon_entropy import shannon_entropy
from elastic_lsopt.probes.noise.noise_scale import noise_scale
from elastic_lsopt.probes.noise.worker_disagreement import worker_disagreement
from elastic_lsopt.probes.trajectory.edge_of_stability import adam_edge_of_stability, edge_of_stability
from elastic_lsopt.space.vector import Vector
from tests.cases import engines


class Quadratic(nn.Module):
    """L = w'Hw/2 + c'w + offset + <x, w> of the sample: its gradient is H w + c + x."""

    def __init__(self, h: Tensor, w: Tensor, c: Tensor | None = None, offset: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.register_buffer("h", h)
        self.register_buffer("c", torch.zeros_like(w) if c is None else c)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        return 0.5 * w @ self.h @ w + self.c @ w + self.offset + x @ w


def mean(model: Any, batch: Any) -> Tensor:
    return model(batch[0]).mean()


def quadratic(h: Tensor, w: Tensor, c: Tensor | None = None, offset: float = 0.0, units: int = 1) -> Any:
    """(space, oracle) of that quadratic, without sample terms."""
    x = torch.zeros(2, len(w), dtype=w.dtype)
    return lso.attach(Quadratic(h, w, c, offset), mean, [(x,)] * units)


def dense(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite H, a point w and a linear term c."""
    torch.manual_seed(seed)
    a = torch.randn(n, n, dtype=torch.float64)
    return a @ a.T / n + 0.1 * torch.eye(n, dtype=torch.float64), *torch.randn(2, n, dtype=torch.float64)


def vector(space: Any, whole: dict[str, Tensor]) -> Vector:
    """This rank's pieces of whole tensors by name."""
    out = space.zeros()
    for piece, t in zip(space.layout.pieces, out.tensors, strict=True):
        flat = whole[space.layout.parameters[piece.parameter].name].detach().reshape(-1)
        t.copy_(flat[piece.offset : piece.offset + piece.length])
    return out


def split_loss() -> lso.Loss:
    return lso.Loss(
        forward=lambda model, batch: model(batch[0]),
        criterion=lambda z, batch: nn.functional.cross_entropy(z, batch[1]),
        count=lambda batch: float(len(batch[1])),
    )


def _numbers(result: Any) -> list[float]:
    """The floats of a result, in order; not the time."""
    out: list[float] = []
    for name in result.__dataclass_fields__:
        value = getattr(result, name)
        if name == "seconds":
            continue
        for x in value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else [value]:
            if isinstance(x, float | int):
                out.append(float(x))
    return out


def measures(kind: str, bits: int = 64) -> dict[str, list[float]]:
    """Every measure's numbers on the small net in fp64 or fp32, seven units of uneven size."""
    dtype = torch.float64 if bits == 64 else torch.float32
    units = engines.batches(1, 7, last=2, dtype=dtype)[0]
    engine = engines.build(kind, engines.net((), dtype), lso.Plain(), loss_fn=split_loss())
    space, oracle = lso.attach(engine, None, engines.mine(units))
    before = engines.whole(space)
    singles = [lso.attach(engine, None, engines.mine([u]))[1] for u in units]
    torch.manual_seed(7)
    workers = [
        vector(space, {n: t + 0.3 * torch.randn(t.shape, dtype=t.dtype) for n, t in before.items()}) for _ in range(3)
    ]
    short: dict[str, Any] = {"tolerance": 1e-2}
    out = {
        "filter_norms": [space.norm(filter_norms(space))],
        "normalised": [space.norm(normalised(space, oracle)(space.weights.clone()))],
        "lpf": _numbers(lpf(space, oracle, sigma=0.05, draws=3)),
        "lpf normalised": _numbers(lpf(space, oracle, sigma=0.05, draws=3, normalised=True)),
        "epsilon": _numbers(epsilon_sharpness(space, oracle, **short)),
        "epsilon normalised": _numbers(epsilon_sharpness(space, oracle, **short, normalised=True)),
        "pac_bayes": _numbers(pac_bayes(space, oracle, initial=workers[0], draws=2, **short)),
        "logit_share": _numbers(logit_share(space, oracle, rho=0.1)),
        "fisher_rao": _numbers(fisher_rao(space, oracle)),
        "local_entropy": _numbers(local_entropy(space, oracle, draws=3)),
        "mu_le": _numbers(local_entropy_gradient(space, oracle, steps=4, normalised=True)),
        "shannon": _numbers(shannon_entropy(space, oracle)),
        "gradient": _numbers(gradient_norm(space, oracle)),
        "sam": _numbers(sam_sharpness(space, oracle, rho=0.1)),
        "sam adaptive": _numbers(sam_sharpness(space, oracle, rho=0.1, adaptive=True, norm="linf", steps=3, starts=1)),
        "mean_valley": _numbers(mean_valley(space, oracle, workers=workers, kappa=1.1, tolerance=1e-2)),
        "noise": _numbers(noise_scale(space, singles, curvature=oracle)),
        "disagreement": _numbers(worker_disagreement(space, oracle, rounds=[workers], eigenvectors=None)),
    }
    after = engines.whole(space)
    out["moved"] = [float(any(not torch.equal(before[n], after[n]) for n in before))]
    engines.close(engine)
    return out


def edges(kind: str, bits: int = 64) -> list[float]:
    """The ratios of SGD and Adam after two steps of AdamW."""
    dtype = torch.float64 if bits == 64 else torch.float32
    engine = engines.build(kind, engines.net((), dtype), lso.Plain(), base="adamw", loss_fn=split_loss())
    steps = engines.batches(2, 7, last=2, dtype=dtype)
    for units in steps:
        engine.train_batch(engines.mine(units))
    space, oracle = lso.attach(engine, None, engines.mine(steps[0]))
    out = [
        edge_of_stability(space, oracle, learning_rate=0.1, momentum=0.9).value,
        adam_edge_of_stability(space, oracle, learning_rate=1e-2, steps=2).value,
    ]
    engines.close(engine)
    return out
