"""The oracle of a user's own loop: a closure is one full gradient, run as often as the method needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.oracle import Oracle, Part
from elastic_lsopt.oracle.passes import Passes
from elastic_lsopt.oracle.slot import replayed
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.noise import block_seed

Closure = Callable[[], Tensor]


class ClosureOracle(Oracle):
    """`closures`, one a part, each: zero_grad, forward, backward (averaged over ranks), return the mean loss.

    Each sees the same dropout in every pass of a step. `loss` of a pass is the mean over ranks and closures. With
    several closures `zero_grad` of the wrapping optimizer does nothing between them, so their gradients add up.
    """

    def __init__(self, space: ParameterSpace, backend: Passes, closures: Sequence[Closure], clock: SampleClock) -> None:
        super().__init__(space, backend, clock)
        self._closures = list(closures)

    @property
    def keeps_gradient(self) -> bool:
        """Whether a `zero_grad` now would throw away a part's gradient."""
        return self._running is not None and self._running.done > 0

    def parts(self, m: int) -> list[Part]:
        if m != len(self._closures):
            raise UserError(
                f"the method takes {m} part(s), step() got {len(self._closures)} closure(s); give a closure a part."
            )
        return [Part(self, i, m, 1 / m) for i in range(m)]

    def loss(self) -> float:
        raise UserError(
            "a closure runs backward too and cannot give the loss alone; use lso.attach(model, loss_fn, batches)."
        )

    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        before = [p.grad for p in self.backend.slot_keys] if self.keeps_gradient else None
        seed = block_seed(self.space.seed, "dropout", self.step, part.number * self.backend.world + self.backend.rank)
        with replayed(seed, self.backend.device), torch.enable_grad():
            value = self._closures[part.number]()
        if not isinstance(value, Tensor | float | int):
            raise UserError(f"the closure returned {value!r}; return the mean loss of its batch.")
        loss = torch.as_tensor(value, dtype=torch.float64).detach().reshape(())  # still where it was computed
        if before and any(
            g is not None and p.grad is not g for p, g in zip(self.backend.slot_keys, before, strict=True)
        ):
            raise UserError(
                "a closure threw away the gradient of the part before it; "
                "call the LandscapeOptimizer's zero_grad(), not the model's."
            )
        if last and part.of > 1:
            with torch.no_grad():
                torch._foreach_mul_(list(self.backend.gradients()), part.weight)
        return loss * part.weight / self.backend.world, (~loss.isfinite()).int()
