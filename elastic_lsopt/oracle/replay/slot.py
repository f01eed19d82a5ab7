"""One forward of this rank in a pass over the global batch: a micro-batch with its weight and its dropout, or an idle
slot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.losses.loss import Loss, idle


def generators_of(device: torch.device) -> list[torch.Generator]:
    """torch's common generators that work on `device` draws from: the CPU's, and a GPU's own."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextmanager
def replayed(seed: int, device: torch.device) -> Iterator[None]:
    """What a forward on `device` draws starts from `seed` inside, and goes on as if nothing had happened after.

    Not `torch.manual_seed`: it would start all other GPUs of this process anew as well, and nobody puts those back.
    """
    generators = generators_of(device)
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@dataclass(frozen=True)
class Slot:
    """`share` is the micro-batch's share of the batch's total weight, 0 for an idle slot: a real batch, selected
    out."""

    batch: Any
    share: float
    seed: int

    def value(self, loss: Any, model: Any, device: torch.device) -> Tensor:
        """The loss of the micro-batch, not weighed; of an idle slot a zero that is still connected to the weights."""
        with replayed(self.seed, device):
            if self.share or not torch.is_grad_enabled():
                return loss(model, self.batch)
            return idle(loss, model, self.batch)

    def logits(self, loss: Loss, model: Any, device: torch.device) -> Tensor:
        """What goes into the criterion. Raises UserError where it is no single tensor."""
        with replayed(self.seed, device):
            out = loss.forward(model, self.batch)
        if not isinstance(out, Tensor):
            raise UserError(
                f"forward of lso.Loss returned a {type(out).__name__}; what asks for logits needs one tensor of them."
            )
        return out
