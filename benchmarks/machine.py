"""Where figures come from: the commit, and the machine and versions that they were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "deepspeed", "transformers", "pytorch_optimizer", "hessian-eigenthings", "PyHessian",
    "curvlinops-for-pytorch",
)  # fmt: skip
"""Whose versions a result holds; older results hold those of the first four."""


def commit(checkout: Path = ROOT) -> str:
    """The short commit, with "-dirty" where tracked files outside of results/ differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def describe() -> dict[str, object]:
    """CPU or GPU, cores, load when the run began, versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "kind": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
