"""How often a step waits for the device: once when the batch is agreed on, once per pass, however many units it has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.oracle.losses.loss import classification_loss

UNITS = 4
METHODS = [
    lso.Plain(), lso.SAM(), lso.SAM(radius="parameter"), lso.SAM(radius="row"), lso.ASAM(),
    lso.LPFSGD(parts=2, gamma=0.01, alpha=1.0),
]  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts what makes a Python number of a tensor, which on a GPU waits for all that was asked of it before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: str) -> Iterator[Callable[[], int]]:
    """The number of times that the host has waited inside."""
    if device == "cpu":
        with Reads() as reads:
            yield lambda: reads.count
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(w.message) for w in told)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def model_on(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)


def batch(seed: int, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)
    labels[0] = -100  # a masked label: the weight of a unit is not its size
    return {"x": x.to(device), "labels": labels.to(device)}


@pytest.mark.fast
def test_a_step_reads_no_number_per_unit_or_parameter() -> None:
    check_engine("cpu")


@pytest.mark.fast
def test_a_closures_step_reads_no_number_of_its_own() -> None:
    check_closure("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_once_and_once_per_pass() -> None:
    check_engine("cuda")
    check_closure("cuda")


def check_engine(device: str) -> None:
    for method in METHODS:
        model = model_on(device)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = lso.Engine(backend_for(model, base, max_grad_norm=1.0), method, loss_fn=classification_loss())
        batches = [batch(i, device) for i in range(UNITS)]
        engine.train_batch(batches)  # what is made once
        with waits(device) as count:
            engine.train_batch(batches)
        assert engine.last_step is not None
        assert count() <= engine.last_step.passes + 1, (method, count())


def check_closure(device: str) -> None:
    model, data = model_on(device), batch(0, device)
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.SAM())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data["x"]), data["labels"])
        loss.backward()
        return loss

    optimizer.step(closure)
    with waits(device) as count:
        optimizer.step(closure)
    assert count() <= 2, count()
