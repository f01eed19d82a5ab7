"""What a method's step costs beside the base's: SAM against two base steps, LPF-SGD against one of the same four units.

The base is our engine with method none on the same backend, so the ratio holds what the method adds and nothing else:
the perturbation, its way back, and the gathers that they make necessary.
"""

from __future__ import annotations

from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.models import SIZES, beside, engine, units
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks

BACKENDS = ("fsdp2", "ddp", "zero2", "zero3")
METHODS: dict[str, tuple[Any, int, int]] = {
    # method, units a rank, base steps that it is measured against
    "sam": (lso.SAM(rho=0.05), 1, 2),
    "lpf_sgd": (lso.LPFSGD(parts=4, gamma=0.0005, alpha=1.0), 4, 1),
}


def compare(kind: str, size: str) -> dict[str, object]:
    """Both methods on one backend, inside a process group (collective)."""
    figures: dict[str, object] = {}
    base = engine(kind, SIZES[size], lso.Plain())
    for name, (method, count, base_steps) in METHODS.items():
        ours, batch = beside(base, method), units(SIZES[size], count)

        def base_work(batch: Any = batch, steps: int = base_steps) -> None:
            for _ in range(steps):
                base.train_batch(batch)

        def our_work(ours: Any = ours, batch: Any = batch) -> None:
            ours.train_batch(batch)

        times = rounds(SIZES[size].pairs, base=base_work, ours=our_work)
        assert ours.last_step is not None and not ours.last_step.skipped, "a skipped step measures nothing"
        against = "two_base_steps" if base_steps == 2 else "base_step"
        figures |= ratio_of(times["ours"], times["base"]).figures(f"{name}_{kind}_of_{against}")
    return figures


def run() -> dict[str, object]:
    """All backends, one after another, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for kind in BACKENDS:
        figures |= on_ranks("benchmarks.step.methods:compare", kind=kind, size=size)
    return figures
