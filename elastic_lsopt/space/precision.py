"""Matrix products in the full precision of their operands.

TF32 and bf16 products keep 10 and 7 bits of fp32's 23: `torch.set_float32_matmul_precision("high")` asks for them, and
cuDNN's convolutions use TF32 unless they are told not to. A step bears it. A basis that was made orthogonal with them
is so to three digits, and Lanczos on it finds eigenvalues that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, or in a function that this decorates, fp32 products are exact to fp32; then all is as the user had it.

    The setting is the process's: threads beside this one see it too.
    """
    backends: Any = torch.backends  # whose attributes type checkers do not all see
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    kinds = (cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
