"""Law 7: what a method adds to the base's memory on a rank, in real bytes of the CPU allocator."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_lsopt as lso
from elastic_lsopt.backends.fabric.ending import _wait_for_gloo
from tests.cases import engines
from tests.cases.contract import dtype_of

WIDTH, DEPTH = 384, 8
RANK = 64
"""Of each of two adapters."""


class Mallinfo(ctypes.Structure):
    """glibc's account of the whole process, all threads (2.33 or later); bytes in use are uordblks + hblkhd."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                     "fordblks", "keepcost")
    ]  # fmt: skip


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = Mallinfo


def bytes_in_use() -> int:
    now = LIBC.mallinfo2()
    return now.uordblks + now.hblkhd


class Watch(TorchDispatchMode):
    """Looks at the process's bytes after every torch operation, forward and backward."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, bytes_in_use())
        return out


def settled_bytes() -> int:
    """Bytes in use once gloo's threads, which free some buffers late, have nothing left to do."""
    gc.collect()
    dist.barrier()
    reads = []
    for _ in range(5):
        time.sleep(0.01)
        _wait_for_gloo()
        reads.append(bytes_in_use())
    return min(reads)


def bytes_of(run: Callable[[], Any], repeats: int = 3) -> tuple[int, int]:
    """Bytes at the peak of `run` and before it; the least of several."""
    peaks, rests = [], []
    for _ in range(repeats):
        rests.append(settled_bytes())
        with Watch() as watch:
            run()
        peaks.append(watch.peak)
    return min(peaks), min(rests)


class Wide(nn.Module):
    """1.2 million weights in eight equal layers, each an FSDP group: one piece is an eighth of the vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, engines.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


def wide_engine(
    kind: str, method: Any, total: int, zero: dict[str, Any] | None, bf16: bool, adversary: bool = False
) -> lso.Engine:
    torch.manual_seed(0)
    model = Wide().to(dtype_of(kind, "fp32", bf16))  # `engines.build` shards each of its layers
    if adversary:
        engines.adapt(model, r=RANK, adversary=RANK, target_modules=tuple(map(str, range(DEPTH))))
    return engines.build(kind, model, method, zero=zero, bf16=bf16, total_samples=total)


def extra_bytes(
    kind: str,
    zero: dict[str, Any] | None = None,
    bf16: bool = False,
    methods: Sequence[str] = ("asam", "lpf_sgd"),
    adversary: bool = False,
) -> dict[str, dict[str, float]]:
    """Each method's bytes at the peak of a step and after it over those of the base alone, in fp32 shards of this rank.

    Under "base": the base's own peak over an empty process, in the same unit. `adversary`: two adapters are trained.
    """
    torch.manual_seed(1)
    dtype = dtype_of(kind, "fp32", bf16)
    units = [(torch.randn(4, WIDTH).to(dtype), torch.randint(0, engines.CLASSES, (4,))) for _ in range(6)]
    seen: dict[str, tuple[int, int]] = {}
    shard = 1
    for name in ("sam", "none", "sam", *methods):  # the first run loads the code of both: written over
        empty = settled_bytes()
        hyper = {"r": RANK, "rho": 1e-3} if name == "bi_lora" else engines.HYPERPARAMETERS[name]
        engine = wide_engine(kind, lso.registry.build(name, **hyper), 100 * 24, zero, bf16, adversary)
        own = engines.mine(units)
        engine.train_batch(own)  # makes the base's state and the framework's buffers
        engine.train_batch(own)
        peak, rest = bytes_of(lambda e=engine, o=own: e.train_batch(o))
        seen[name] = (peak - empty, rest - empty)
        shard = engine.space.layout.local_numel * 4
        engines.close(engine)
        del engine
    peak, rest = seen.pop("none")
    out = {n: {"peak": (p - peak) / shard, "kept": (r - rest) / shard} for n, (p, r) in seen.items()}
    return {**out, "base": {"peak": peak / shard}}
