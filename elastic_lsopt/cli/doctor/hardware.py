"""This machine: cores, memory, GPUs and NCCL, limits of the shell."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from elastic_lsopt.cli.doctor.finding import Finding, fail, ok, warn
from elastic_lsopt.elastic.worker.open_files import too_few

GIB = 2**30
RANKS = 64
"""A job of so many is what the limit of open files is looked at for."""
LEAST_SHARED = GIB
LEAST_FREE = 0.1


def look_at_hardware(*, gpu: bool, ranks: int = RANKS) -> Iterator[Finding]:
    """`gpu`: one is asked for, and its absence is a fault."""
    yield ok("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(told[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    memory = f"{free / GIB:,.1f} GiB free of {total / GIB:,.1f}"
    if free < LEAST_FREE * total:
        yield warn("host memory", memory, "end what else runs here; workers that are short of it are killed")
    else:
        yield ok("host memory", memory)
    yield from _shared_memory()
    yield from _gpus(asked=gpu)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wrong := too_few(ranks, limit, deepspeed=True, cuda=gpu):
        yield warn("open files", f"limit {limit:,}", wrong)
    else:
        yield ok("open files", f"limit {'none' if limit == resource.RLIM_INFINITY else f'{limit:,}'}")


def _shared_memory() -> Iterator[Finding]:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        yield warn("shared memory", "there is no /dev/shm", "mount one; NCCL and data workers use it")
        return
    found = f"/dev/shm of {size / GIB:,.2f} GiB"
    if size < LEAST_SHARED:
        yield warn("shared memory", found, "start the container with --shm-size=8g or --ipc=host")
    else:
        yield ok("shared memory", found)


def _gpus(*, asked: bool) -> Iterator[Finding]:
    import torch

    from elastic_lsopt.world import on_gpu

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else (
            f"torch {torch.__version__} is built without CUDA"
        )  # fmt: skip
        if asked:
            fix = "install torch for CUDA" if torch.version.cuda is None else "check nvidia-smi, CUDA_VISIBLE_DEVICES"
            yield fail("GPU", f"none, and one is asked for; {built}", fix)
        else:
            yield ok("GPU", f"none; jobs run on the CPU ({built})")
        return
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        found = f"{torch.cuda.get_device_name(number)}, {free / GIB:,.1f} GiB free of {total / GIB:,.1f}"
        if free < (1 - LEAST_FREE) * total:
            yield warn(f"GPU {number}", found, "another process holds some of it: nvidia-smi says which")
        else:
            yield ok(f"GPU {number}", found)
    if not torch.cuda.is_bf16_supported():
        yield warn("bf16", "the GPU has none", "leave bf16: false")
    if not torch.distributed.is_nccl_available():
        yield fail("NCCL", "torch is built without it", "install torch for CUDA from its own index")
    else:
        from torch.cuda import nccl

        yield ok("NCCL", ".".join(map(str, nccl.version())))
    if not on_gpu():
        yield warn("device", "DS_ACCELERATOR=cpu keeps jobs on the CPU", "unset DS_ACCELERATOR")
