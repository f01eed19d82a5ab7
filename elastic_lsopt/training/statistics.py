"""Batch norm's running statistics, estimated anew for weights that no step has led to: a mean of replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from elastic_lsopt.api.engine import Engine


def estimate_anew(engine: Engine, batches: Iterable[Any]) -> None:
    """The mean over these batches of each batch norm's statistics (collective where the model's forward is).

    Nothing is read where the model has none. Cost: a forward per batch.
    """
    norms = [m for m in engine.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [(m, m.momentum) for m in norms if m.track_running_stats]
    if not tracked:
        return
    modes = [(m, m.training) for m in engine.module.modules()]
    for norm, _ in tracked:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    engine.module.train()
    with torch.no_grad():
        for batch in batches:
            engine.loss(engine.module, batch)
    for norm, momentum in tracked:
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode


def spread(samples: int, size: int, batches: int) -> Iterator[list[int]]:
    """Numbers of samples for at most so many batches of `size`, spread evenly over all of them."""
    count = min(batches * size, samples)
    chosen = [i * samples // count for i in range(count)]
    for begin in range(0, count, size):
        yield chosen[begin : begin + size]
