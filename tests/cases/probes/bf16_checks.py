"""A job in bf16 whose network has a kernel that autograd cannot differentiate twice, or a hook that changes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.loop import TrainingRun
from elastic_lsopt.training.probing.during_training import fixed_microbatches
from elastic_lsopt.training.reporting.console import Console
from tests.cases import engines
from tests.cases.elastic.jobs import this_world
from tests.cases.probes.products import ConstantTanh


class NarrowTanh(ConstantTanh):
    """… that knows no fp64, as compiled kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("narrow_tanh is not implemented for Double")
        return ConstantTanh.forward(ctx, x)


class Network(nn.Module):
    """64 features to 10 classes, with tanh by one of the kernels; `after`: what a hook makes of the hidden units."""

    def __init__(self, kernel: str = "plain", after: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        self._tanh: Any = {"plain": torch.tanh, "constant": ConstantTanh.apply, "narrow": NarrowTanh.apply}[kernel]
        if after != 1.0:
            self.second.register_forward_hook(lambda module, given, out: out * after)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(self._tanh(self.first(x)))))


def measured(path: str, steps: int = 1) -> dict[str, Any]:
    """What the job's probes say after that step, and the whole Hessian's largest eigenvalue there, in fp64."""
    found = read_job(path)
    data = build_data(found.config)
    run = TrainingRun(found.config, found.method, data, this_world(), Console())
    run.resume()
    row: dict[str, Any] = {}
    for units in run.loader:
        row = run.step(units)
        if row["step"] == steps:
            break
    weights = engines.whole(run.engine.space)
    units, _ = fixed_microbatches(data, found.config, this_world(), 4)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [u.batch for u in units if not u.idle])
    every = [batch for own in gathered for batch in own]
    x = torch.cat([batch["x"] for batch in every]).double()
    y = torch.cat([batch["labels"] for batch in every])
    run.abandon()
    engines.close(run.engine)
    top = torch.linalg.eigvalsh(_hessian(weights, x, y))[-1].item()
    return {"probes": row["probes"], "truth": top}


def _hessian(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    model = Network().double()
    names, sizes = list(weights), [t.numel() for t in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: t.view(weights[n].shape) for n, t in zip(names, flat.split(sizes), strict=True)}
        return nn.functional.cross_entropy(functional_call(model, parts, (x,)), y)

    flat = torch.cat([t.double().reshape(-1) for t in weights.values()])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[return-value]
