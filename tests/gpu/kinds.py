"""Where the tests on a device run: one rank with NCCL, two of one device by gloo; `TESTS_ON=cpu` tries them without."""

from __future__ import annotations

import os

FRAMEWORK = ("plain", "ddp", "fsdp2")
ZERO = ("zero0", "zero1", "zero2", "zero3")
KINDS = (*FRAMEWORK, *ZERO)
OFFLOAD = ("fsdp2-offload", "zero1-offload", "zero2-offload", "zero3-offload", "zero3-offload-param")
LIMIT = {"fp32": 1e-6, "fp64": 1e-12}
ON_CUDA = os.environ.get("TESTS_ON") == "cuda"


def dtype_of(kind: str) -> str:
    """ZeRO's masters are fp32."""
    return "fp32" if kind in ZERO else "fp64"
