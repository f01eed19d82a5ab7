"""How many bytes this process may still take, for choices that depend on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in both generations of Linux's control groups."""

PROCESSES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""How torchrun, DeepSpeed, MPI and Slurm say how many processes of the job share this machine."""


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or this rank's share of what is free on the host (and within its container's limit)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for limit, used in CGROUPS:
        if Path(limit).exists() and (text := Path(limit).read_text(encoding="ascii").strip()) != "max":
            free = min(free, int(text) - int(Path(used).read_text(encoding="ascii")))
    return max(free, 0) // next((int(os.environ[name]) for name in PROCESSES if os.environ.get(name, "").isdigit()), 1)
