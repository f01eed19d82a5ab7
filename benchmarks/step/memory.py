"""Extra bytes on a rank while a method steps: its peak over a step less the base's, both from the same state.

On a CPU the allocator's own record is read (torch's profiler writes down each block that is taken or given back), on
a GPU its peak counter. Micro-batches are short, so that activations do not hide the weights' copies.

FSDP2 and gloo keep the buffers of finished gathers and reductions for a while, how many is chance: up to a few blocks
in either peak. So the least of some steps counts, and `perturbed` measures what a perturbation takes by
itself (on ZeRO-1/2 with gloo's own copy of what it gathers, which the base's step has too).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import elastic_lsopt as lso
from benchmarks.models import SIZES, beside, engine, units
from benchmarks.workers import on_ranks
from elastic_lsopt.backends.fabric.ending import _wait_for_gloo
from elastic_lsopt.training.building.models import blocks

CASES = (
    # backend, bf16: the forward's weights are then a copy of their own
    ("ddp", False), ("fsdp2", False), ("zero1", True), ("zero2", False), ("zero2", True), ("zero3", False),
    ("zero3", True),
)  # fmt: skip
METHODS = {
    "sam": lso.SAM(rho=0.05),
    "asam": lso.ASAM(rho=0.5),
    "lpf_sgd": lso.LPFSGD(parts=2, gamma=0.0005, alpha=1.0),
}
MARK, STEPS = "measured step", 4


def pause(*_: object) -> None:
    """Between blocks: gloo's threads give the blocks of a finished collective back only when they next get a core."""
    _wait_for_gloo()


def peaks_of(step: Callable[[], object]) -> list[int]:
    """How far the memory in use rises in each of STEPS calls above what it was at the call's start; two come first."""
    step()
    if torch.cuda.is_available():
        return [_peak_on_gpu(step) for _ in range(1 + STEPS)][1:]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()  # blocks older than the record are given back in here, unseen
        for _ in range(STEPS):
            with record_function(MARK):
                step()
    return _peaks(record)


def _peak_on_gpu(step: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _peaks(record: profile) -> list[int]:
    """The rise in each marked call, from the record's own list of blocks taken and given back."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    blocks = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    peaks = []
    for mark in (e for e in events if e["name"] == MARK):
        within = (size for at, size in blocks if mark["ts"] <= at <= mark["ts"] + mark["dur"])
        peaks.append(max(accumulate(within), default=0))
    return peaks


def measure(kind: str, size: str, bf16: bool) -> dict[str, object]:
    """Every method's extra bytes on one backend in one precision (collective), and what a perturbation alone takes."""
    shape = replace(SIZES[size], bf16=bf16, sequence=min(SIZES[size].sequence, 32))
    base = engine(kind, shape, lso.Plain())
    for block in blocks(base.module):
        block.register_forward_pre_hook(pause)
        block.register_full_backward_pre_hook(pause)
    batch = units(shape, 2)
    shard = 4 * base.space.layout.local_numel
    without = min(peaks_of(lambda: base.train_batch(batch)))
    label = f"{kind}_{'bf16' if bf16 else 'fp32'}"

    def displace() -> None:
        with base.space.perturbed(base.space.weights, 1e-3):
            pass

    figures: dict[str, object] = {f"{label}_shard_bytes": shard, f"{label}_base_peak_bytes": without}
    figures[f"displaced_{label}_bytes"] = min(peaks_of(displace))
    for name, method in METHODS.items():
        ours = beside(base, method)
        # The least of the steps: what the frameworks' threads happen to hold on to belongs to no method.
        extra = [peak - without for peak in peaks_of(lambda ours=ours: ours.train_batch(batch))]
        figures[f"{name}_{label}_extra_bytes"] = min(extra)
        figures[f"{name}_{label}_extra_bytes_spread"] = [min(extra), max(extra)]
        figures[f"{name}_{label}_extra_of_fp32_shard"] = min(extra) / shard
    figures[f"displaced_{label}_of_fp32_shard"] = figures[f"displaced_{label}_bytes"] / shard
    return figures


def run() -> dict[str, object]:
    """All cases, one after another, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for kind, bf16 in CASES:
        figures |= on_ranks("benchmarks.step.memory:measure", kind=kind, size=size, bf16=bf16)
    return figures
