"""Our SAM against `pytorch_optimizer`'s on one process: the same model, weights, batch and base, in the same rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.models import LOSS, SIZES, Size, engine, momentum, units
from benchmarks.timing import ratio_of, rounds

RHO = 0.05


def compare(size: Size) -> dict[str, object]:
    """Three SAM steps and two plain torch steps a round; every figure is a ratio within the rounds."""
    import pytorch_optimizer

    ours = engine("plain", size, lso.SAM(rho=RHO))
    model, batch = ours.module, units(size, 1)
    plain = momentum(model.parameters())
    wrapped = lso.LandscapeOptimizer(momentum(model.parameters()), lso.SAM(rho=RHO))
    theirs = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=1e-3, momentum=0.9)

    def loss_of(optimizer: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = LOSS(model, batch[0])
        loss.backward()
        return loss

    def two_base_steps() -> None:
        for _ in range(2):
            loss_of(plain)
            plain.step()

    def their_step() -> None:
        loss_of(theirs)
        theirs.step(lambda: loss_of(theirs))

    def wrapped_step() -> None:
        wrapped.zero_grad()  # what the one before has left on the same model
        wrapped.step(lambda: loss_of(wrapped))

    times = rounds(
        size.pairs,
        base=two_base_steps,
        engine=lambda: ours.train_batch(batch),
        landscape_optimizer=wrapped_step,
        pytorch_optimizer=their_step,
    )
    figures: dict[str, object] = {}
    for name in ("engine", "landscape_optimizer", "pytorch_optimizer"):
        figures |= ratio_of(times[name], times["base"]).figures(f"sam_{name}_of_two_base_steps")
    for name in ("engine", "landscape_optimizer"):
        figures |= ratio_of(times[name], times["pytorch_optimizer"]).figures(f"sam_{name}_of_pytorch_optimizer")
    return figures


def run() -> dict[str, object]:
    """The comparison, in this process."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    return {"size": size, **compare(replace(SIZES[size], samples=4))}
