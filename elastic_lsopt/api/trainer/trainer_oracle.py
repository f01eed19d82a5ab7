"""The loss of one update of Hugging Face's Trainer: a pass is its own `training_step` on each of the micro-batches.

So the loss is the Trainer's: `num_items_in_batch`, label smoothing, `compute_loss_func`, autocast, activation offload
and whatever a subclass adds are the same in each pass, because the same code runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.microbatch import part_bounds
from elastic_lsopt.oracle.oracle import Oracle, Part
from elastic_lsopt.oracle.replay.slot import replayed
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.random.noise import block_seed

Run = Callable[[Any], Tensor]
"""One micro-batch forward and backward; its share of the loss, scaled for a mean over the ranks."""


class TrainerOracle(Oracle):
    """`run` on this rank's micro-batches, the same number on every rank; dropout is the same in each pass.

    Inside `later()` run all passes over a micro-batch but its first. Parts are cut by the micro-batches of a rank. An
    update with fewer of them than parts (the last of an epoch) has as many parts as micro-batches. `shares()` are this
    rank's micro-batches' shares of the global batch (1 over all ranks), for passes over a part alone; None: all alike.
    """

    def __init__(
        self,
        space: ParameterSpace,
        backend: GradientEngine,
        clock: SampleClock,
        run: Run,
        batches: Sequence[Any],
        later: Callable[[], AbstractContextManager[None]] = nullcontext,
        shares: Callable[[], Sequence[float]] | None = None,
    ) -> None:
        super().__init__(space, backend, clock)
        self._shares_of_batches = shares
        self._run_batch, self._batches, self._later = run, batches, later

    def parts(self, m: int) -> list[Part]:
        bounds = part_bounds(len(self._batches), min(m, len(self._batches)))
        return [Part(self, i, len(bounds), (end - first) / len(self._batches)) for i, (first, end) in enumerate(bounds)]

    def loss(self) -> float:
        raise UserError(
            "the Trainer's training_step runs backward too and cannot give the loss alone; use lso.attach(model, "
            "loss_fn, batches), or trainer.evaluate()."
        )

    def _local_share(self, part: Part) -> float:
        if self._shares_of_batches is None:
            return part.weight / self.backend.world
        first, end = part_bounds(len(self._batches), part.of)[part.number]
        return sum(self._shares_of_batches()[first:end])

    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        first, end = part_bounds(len(self._batches), part.of)[part.number]
        local: float | Tensor = 0.0
        nonfinite: int | Tensor = 0
        with self._later() if self._seen(self._alone) else nullcontext():
            for j in range(first, end):
                self.backend.begin(last=last and j == end - 1)
                index = j * self.backend.world + self.backend.rank
                with replayed(block_seed(self.space.seed, "dropout", self.step, index), self.backend.device):
                    value = self._run_batch(self._batches[j])
                value = value.detach().to(torch.float64).reshape(())
                local = local + value / self.backend.world
                nonfinite = nonfinite + (~value.isfinite()).int()
        return local, nonfinite
