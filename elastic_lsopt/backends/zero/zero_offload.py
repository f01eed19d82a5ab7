"""ZeRO whose optimizer is on the host (`offload_optimizer: {device: cpu}`): masters, their gradients, the base's state.

    device   working weights, or their shards          host   masters, gradients, the base's state, every Vector

What DeepSpeed notes while a gradient arrives it believes in the step: the norm of each parameter's gradient, by which
it clips, and whether one overflowed. Both are of the last backward, not of what a method has made of several, so the
step is told the norm of what it really steps with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.backends.zero.zero3 import Zero3
from elastic_lsopt.backends.zero.zero12 import Zero12
from elastic_lsopt.backends.zero.zero_backend import ZeroBackend
from elastic_lsopt.space.vector import Vector

NO_BACKWARD_YET = -1
"""DeepSpeed's count of the backward passes since the last step, before the first."""


class OffloadedZero12(Zero12):
    """Stages 1 and 2 with the optimizer on the host; the gradient lies in the masters' own `grad`, in fp32."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._backwards, self._gathers = 0, False

    def begin(self, *, last: bool) -> None:
        # Stage 2 copies to the masters only what the closing backward has used: a parameter of an earlier micro-batch
        # alone would be left out. So of several none closes, and what all have left on the host is copied at the end.
        self._gathers = last and self._reduces_each and self._backwards > 0
        super().begin(last=last and not self._gathers)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._backwards += 1
        if self._gathers:
            self._wrapper.finalize_gradient_accumulation_boundary()

    def clear_gradient(self) -> None:
        super().clear_gradient()
        z = self._wrapper
        z.reset_cpu_buffers()
        z.micro_step_id, self._backwards = NO_BACKWARD_YET, 0  # the first of a pass goes straight to the masters
        # Else a parameter that the first micro-batch does not use would go on from the sum of an earlier pass, and one
        # that no micro-batch uses would step with it.
        for kept in (*z.accumulated_grads_in_cpu.values(), *self._flat_gradients):
            kept.zero_()

    def gradients(self) -> list[Tensor]:
        self._wrapper._wait_for_offload_copies()
        return self.views(self._flat_gradients)

    @property
    def _flat_gradients(self) -> list[Tensor]:
        return [m.grad for m in self.slot_keys]  # type: ignore[misc]

    def step(self, gradient: Vector, norm: float | None) -> None:
        _tell_norm(self, norm)
        super().step(gradient, norm)


class OffloadedZero3(Zero3):
    """Stage 3 with the optimizer on the host, its gradient buffer too."""

    def clear_gradient(self) -> None:
        super().clear_gradient()
        self._wrapper.reset_cpu_buffers()

    def step(self, gradient: Vector, norm: float | None) -> None:
        # DeepSpeed has copied to the masters what the closing backward used, before the method had its say.
        for master, part in zip(self.slot_keys, self._flat_gradients, strict=True):
            assert master.grad is not None
            master.grad.copy_(part)
        _tell_norm(self, norm)
        super().step(gradient, norm)


def _tell_norm(backend: ZeroBackend, norm: float | None) -> None:
    """DeepSpeed sums the squares of the norms that it has noted over parameters and ranks: one stands for all."""
    z = backend.engine.optimizer
    first = backend.layout.parameters[backend.layout.pieces[0].parameter].name if backend.rank == 0 else None
    z.norm_for_param_grads = {
        z.get_param_id(p): torch.tensor(norm or 0.0) for name, p in backend.parameters.items() if name == first
    }
