"""What a step costs on a device: methods beside their passes, updates and an average beside AdamW, products, versions.

Models of 368M and 1.04B parameters in bf16 under FSDP2, fp32 masters; less than nine minutes on one H100.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.models import SIZES, beside, engine, units
from benchmarks.step.updates import adamw, muon, of
from benchmarks.timing import ratio_of, rounds, seconds
from benchmarks.workers import on_ranks
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.elastic.memory.versions import HostVersions
from elastic_lsopt.probes.spectrum.lanczos import lanczos

KIND = "fsdp2"


def methods(size: str) -> dict[str, object]:
    """SAM against two base steps, LPF-SGD against one of the same four units, on the same weights (collective)."""
    shape, figures = SIZES[size], dict[str, object]()
    base = engine(KIND, shape, lso.Plain())
    for name, method, count, times_base in (
        ("sam_of_two_base_steps", lso.SAM(rho=0.05), 1, 2),
        ("lpf_sgd_of_base_step", lso.LPFSGD(parts=4, gamma=0.0005, alpha=1.0), 4, 1),
    ):
        ours, batch = beside(base, method), units(shape, count)
        works = {
            "base": repeated(lambda b=batch: base.train_batch(b), times_base),
            "ours": lambda o=ours, b=batch: o.train_batch(b),
        }
        times = rounds(shape.pairs, **works)
        figures |= ratio_of(times["ours"], times["base"]).figures(f"{size}_{name}")
    tokens = shape.samples * shape.sequence
    return figures | {f"{size}_base_tokens_per_s": tokens / seconds(lambda: base.train_batch(units(shape, 1)))}


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def updates(size: str) -> dict[str, object]:
    """Steps of LAMB, Muon and with an EMA, each in turns with AdamW's (collective)."""
    shape, figures = SIZES[size], dict[str, object]()
    batch = units(shape, 1)
    base = engine(KIND, shape, lso.Plain(), base=adamw)
    made: dict[str, Callable[[], lso.Engine]] = {
        "lamb": lambda: engine(KIND, shape, lso.Plain(), base=of("lamb")),
        "muon": lambda: engine(KIND, shape, lso.Plain(), base=muon),
        "ema": lambda: engine(KIND, shape, lso.Plain(), base=adamw, keep=[EMA(decay=0.999)]),
    }
    for name, make in made.items():
        ours = make()
        works = {"base": lambda: base.train_batch(batch), "ours": lambda o=ours: o.train_batch(batch)}
        times = rounds(shape.pairs, **works)
        figures |= ratio_of(times["ours"], times["base"]).figures(f"{size}_{name}_step_of_adamw")
        del ours, works
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return figures


def curvature(size: str) -> dict[str, object]:
    """A product against a gradient, and ten of them in a Lanczos run (collective)."""
    shape = SIZES[size]
    held = engine(KIND, shape, lso.Plain())
    space, oracle = lso.attach(held, None, units(shape, 1), checked=False)
    v = space.noise(0).vector()

    def gradient() -> Any:
        return oracle.gradient()

    times = rounds(shape.pairs, base=gradient, ours=lambda: oracle.hvp(v))
    ten = seconds(lambda: lanczos(space, oracle, k=1, max_products=10, tolerance=1e-9))
    return {
        **ratio_of(times["ours"], times["base"]).figures(f"{size}_product_of_gradient"),
        f"{size}_lanczos_10_s": ten,
    }


def versions(size: str) -> dict[str, object]:
    """A step with the capture of its state for the mirror against one without; bytes, and host seconds (collective)."""
    shape = SIZES[size]
    batch, kept, step = units(shape, 1), HostVersions(), 0
    held = engine(KIND, shape, lso.Plain(), base=adamw)
    host: list[float] = []

    def captured() -> None:
        nonlocal step
        held.train_batch(batch)
        step += 1
        begin = time.perf_counter()
        kept.take(held, generation=1, step=step, extra={})
        host.append(time.perf_counter() - begin)
        kept.commit(1, step)

    times = rounds(shape.pairs, base=lambda: held.train_batch(batch), ours=captured)
    return {
        **ratio_of(times["ours"], times["base"]).figures(f"{size}_captured_step_of_step"),
        f"{size}_captured_bytes": kept.newest.index.bytes,
        f"{size}_capture_on_the_host_s": sorted(host)[len(host) // 2],
    }


def run() -> dict[str, object]:
    """Each in a process of its own, so that none meets another's memory."""
    on_a_device = torch.cuda.is_available()
    figures: dict[str, object] = {"device_is": "cuda" if on_a_device else "cpu, a dry run"}
    for size in ("gpu", "large") if on_a_device else ("toy",):
        for part in ("methods", "updates", "versions", *(("curvature",) if size != "large" else ())):
            figures |= on_ranks(f"benchmarks.device:{part}", processes=1, size=size)
    return figures
