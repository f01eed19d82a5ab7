"""The oracle of a user's own loop: a closure is one full gradient, run as often as the method needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.oracle import Oracle, Part
from elastic_lsopt.oracle.replay.slot import replayed
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.random.noise import block_seed

Closure = Callable[[], Tensor]


class ClosureOracle(Oracle):
    """`closures`, each: zero_grad, forward, backward (averaged over ranks), return the mean loss.

    Each sees the same dropout in every pass of a step. `loss` of a pass is the mean over ranks and closures. There is
    one closure a part; or, if `accumulating_losses`, any multiple of that, whose losses (and so gradients) add up to
    the mean. `zero_grad` of the wrapping optimizer does nothing between closures, so their gradients add up.
    """

    def __init__(
        self,
        space: ParameterSpace,
        backend: GradientEngine,
        closures: Sequence[Closure],
        clock: SampleClock,
        *,
        accumulating_losses: bool = False,
    ) -> None:
        super().__init__(space, backend, clock)
        self._closures, self._adds_up = list(closures), accumulating_losses
        self._ran = 0

    @property
    def keeps_gradient(self) -> bool:
        """Whether a `zero_grad` now would throw away the gradient of a closure before it."""
        return self._running is not None and self._ran > 0

    def parts(self, m: int) -> list[Part]:
        closures = len(self._closures)
        if closures % m if self._adds_up else closures != m:
            raise UserError(
                f"the method takes {m} part(s), step() got {closures} closure(s); give a closure a part, or accumulate "
                "a multiple of that."
            )
        return [Part(self, i, m, 1 / m) for i in range(m)]

    def loss(self) -> float:
        raise UserError(
            "a closure runs backward too and cannot give the loss alone; use lso.attach(model, loss_fn, batches)."
        )

    def _local_share(self, part: Part) -> float:
        return part.weight / self.backend.world

    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        each = len(self._closures) // part.of
        numbers = range(part.number * each, (part.number + 1) * each)
        self._ran = numbers.start
        loss, nonfinite = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        for number in numbers:
            value = self._run_closure(number)
            loss, nonfinite = value + loss, (~value.isfinite()).int() + nonfinite
        weight = 1.0 if self._adds_up else part.weight
        if last and weight != 1.0:
            with torch.no_grad():
                torch._foreach_mul_(list(self.backend.gradients()), weight)
        return loss * weight / self.backend.world, nonfinite

    def _run_closure(self, number: int) -> Tensor:
        """Its loss, a 0-d fp64 tensor where it was computed."""
        before = [p.grad for p in self.backend.slot_keys] if self.keeps_gradient else None
        seed = block_seed(self.space.seed, "dropout", self.step, number * self.backend.world + self.backend.rank)
        with replayed(seed, self.backend.compute_device), torch.enable_grad():
            value = self._closures[number]()
        if not isinstance(value, Tensor | float | int):
            raise UserError(f"the closure returned {value!r}; return the mean loss of its batch.")
        if before and any(
            g is not None and p.grad is not g for p, g in zip(self.backend.slot_keys, before, strict=True)
        ):
            raise UserError(
                "a closure threw away the gradient of the one before it; "
                "call the LandscapeOptimizer's zero_grad(), not the model's."
            )
        self._ran = number + 1
        return torch.as_tensor(value, dtype=torch.float64).detach().reshape(())
