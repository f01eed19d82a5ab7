"""DeepSpeed as accelerate prepares it, under passes of ours: who says where an update ends, and who steps.

accelerate's wrapper of the engine sets the boundary and steps inside the last backward of every pass, when a method has
yet to move the weights; the gradient of the first pass is gone then. So the engine is told an accumulation of 1, its
backward only runs backward, and the boundary and the step are the backend's (`ZeroBackend.begin`, `step`).
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DeepSpeedEngineWrapper
from torch import Tensor


class BackwardOnly(DeepSpeedEngineWrapper):
    """What `accelerator.backward` calls: no boundary, no step."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **more: Any) -> None:
        self.engine.backward(loss, **more)


def count_one_micro_batch(config: dict[str, Any]) -> None:
    """Write an accumulation of 1 into a DeepSpeed JSON whose values are the Trainer's already; its product follows."""
    accumulated = config.get("gradient_accumulation_steps", 1)
    if isinstance(accumulated, int) and isinstance(config.get("train_batch_size"), int):
        config["train_batch_size"] //= accumulated
    config["gradient_accumulation_steps"] = 1
