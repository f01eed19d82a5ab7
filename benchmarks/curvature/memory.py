"""A rank's memory under FSDP2 on one process and on two: a blockwise product, and a probe's vectors.

On a CPU a peak is the process's resident memory: VmHWM, set back (clear_refs) before the product, less VmRSS after
the imports, the process group and the same on a toy. Blocks from 64 KiB are given back to the system when they are
freed (MALLOC_MMAP_THRESHOLD_), so that what is resident is what is held. On a GPU it is the allocator's peak counter.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from benchmarks.curvature.model import Batch, mean_loss
from benchmarks.models import device
from benchmarks.workers import on_ranks, world
from elastic_lsopt.space.basis import Basis

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
VECTORS = 20
CLASSES, SAMPLES = 16, 8


@dataclass(frozen=True)
class Wide:
    """Equal blocks of two matrices each: weights by far outweigh the activations of a small batch."""

    width: int
    blocks: int


SHAPES = {"toy": Wide(16, 2), "cpu": Wide(1024, 20), "gpu": Wide(4096, 20)}


class Block(nn.Module):
    """A residual perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Perceptron(nn.Module):
    """(samples, width) to (samples, CLASSES)."""

    def __init__(self, shape: Wide) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape.width) for _ in range(shape.blocks))
        self.head = nn.Linear(shape.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _sharded(shape: Wide) -> Perceptron:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Perceptron(shape).to(device())
    for part in [*model.layers, model]:
        fully_shard(part)
    return model


def _batch(shape: Wide) -> Batch:
    torch.manual_seed(1)
    x, y = torch.randn(SAMPLES, shape.width), torch.randint(CLASSES, (SAMPLES,))
    return x.to(device()), y.to(device())


def held() -> int:
    """Bytes that this process holds now."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak_of(work: Callable[[], object]) -> int:
    """Bytes at the peak while `work` runs, with all that is held already."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text("5")
    work()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))


def measure(size: str) -> dict[str, int]:
    """Bytes on rank 0 (collective): the shard, the peak of a blockwise product, what VECTORS vectors add."""
    _measure(SHAPES["toy"])  # what is loaded at first use, and the collectives' own buffers, count for no model
    return _measure(SHAPES[size])


def _measure(shape: Wide) -> dict[str, int]:
    before = held()
    model, batch = _sharded(shape), _batch(shape)
    space, oracle = lso.attach(model, mean_loss, [batch], products="blockwise", checked=False)
    at_rest = held() - before
    peak = peak_of(lambda: oracle.hvp(space.noise(0, 0).vector())) - before
    oracle.products.close()
    v, resident = space.noise(0, 1).vector(), held()
    basis = Basis(space, VECTORS)
    for _ in range(VECTORS):
        basis.append(v)
    return {
        "at_rest": at_rest,
        "blockwise_peak": peak,
        "vector_bytes": held() - resident,
        "vector_tensor_bytes": basis.local_bytes,
        "model": 4 * space.layout.numel,
    }


def run() -> dict[str, object]:
    """On one process and on two, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    if size == "gpu" and world() < 2:
        return {"size": size}
    with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
        one, two = (on_ranks("benchmarks.curvature.memory:measure", processes=n, size=size) for n in (1, 2))
    figures: dict[str, object] = {"size": size, "model_bytes": one["model"]}
    for name in ("blockwise_peak", "vector_bytes", "vector_tensor_bytes", "at_rest"):
        figures[f"{name}_world2_of_world1"] = two[name] / one[name]
        figures |= {f"{name}_world1": one[name], f"{name}_world2": two[name]}
    return figures
