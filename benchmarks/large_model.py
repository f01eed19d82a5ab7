"""A model of 1.3B parameters on two workers of one host: it loads in shards and takes two steps of SAM over SGD.

What the load costs in seconds is measured apart, in turns with safetensors reading the same bytes once.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.anonymous_memory import Peak, anonymous_bytes
from benchmarks.loading import KINDS, config_of, loaded, make, seconds, world_here
from benchmarks.workers import on_ranks
from elastic_lsopt.training.building.engines import build_engine
from elastic_lsopt.training.datasets.samples import build_data


def two_sam_steps(folder: str) -> dict[str, float]:
    """Load, and take two steps of SAM over SGD; all ranks' anonymous bytes at the peak, and seconds (collective)."""
    config = config_of(folder, "fsdp2")  # a step in bf16 takes minutes on a CPU
    begin = time.perf_counter()
    before = anonymous_bytes()
    with Peak() as peak:
        engine = build_engine(config, lso.SAM(rho=0.05), build_data(config), world_here(), total_samples=8)
        at = time.perf_counter()
        ids = torch.arange(32).view(2, 16)
        losses = [float(engine.train_batch([{"input_ids": ids, "labels": ids}])) for _ in range(2)]
    total = torch.tensor([before + peak.bytes])
    dist.all_reduce(total)
    assert all(map(math.isfinite, losses)), losses
    return {
        "sam_1_3b_two_workers_bytes": int(total), "sam_1_3b_load_s": at - begin,
        "sam_1_3b_step_s": (time.perf_counter() - at) / 2,
    }  # fmt: skip


def seconds_of_a_load(folder: str, kind: str, pairs: int) -> dict[str, Any]:
    """Beside safetensors (collective)."""
    engine, _ = loaded(config_of(folder, kind))
    return seconds(engine, folder, kind, pairs)


def run(size: str = "1.3b", pairs: int = 7) -> dict[str, Any]:
    """The figures; 3 GB on disk for a while."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{size}"
        make(Path(path), size)
        figures: dict[str, Any] = {}
        for kind in KINDS:
            timed = "benchmarks.large_model:seconds_of_a_load"
            figures |= on_ranks(timed, processes=2, folder=path, kind=kind, pairs=pairs)
        return figures | on_ranks("benchmarks.large_model:two_sam_steps", processes=2, folder=path)
