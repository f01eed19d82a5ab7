"""Numbers of the host on the device, without waiting for the device.

`torch.tensor(numbers, device="cuda")` copies from pageable memory, so the host waits until all that was asked of the
GPU before has ended; from pinned memory the copy takes its turn among the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """fp64 (len(numbers),) on `device`, of Python numbers and one-element tensors that may be there already."""
    values = torch.tensor([0.0 if isinstance(n, Tensor) else float(n) for n in numbers], dtype=torch.float64)
    if device.type == "cuda":
        values = values.pin_memory().to(device, non_blocking=True)
    for i, number in enumerate(numbers):
        if isinstance(number, Tensor):
            values[i] = number.detach().reshape(())
    return values
