"""How fast the noise is: on a CPU against torch.randn (target: half its speed), on a GPU against a copy (0.7)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from elastic_lsopt.space.random.noise import add_normal_, fill_normal_

ELEMENTS = 10_000_000
GPU_ELEMENTS = 250_000_000
PAIRS = 7
STREAM = {"seed": 1, "name": "weight", "offset": 0}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, to the end of what it launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def paired(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, in pairs A B A B so that a change of the machine's clock meets both."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(PAIRS)]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def on_cpu() -> dict[str, float]:
    """Speeds at 1e7 fp32 elements as shares of torch's own: 1 is equal, above 1 is faster."""
    out = torch.zeros(ELEMENTS)
    rows = torch.linspace(0.5, 1.0, ELEMENTS // 1000)
    fill, randn = paired(lambda: fill_normal_(out, **STREAM), lambda: torch.randn(ELEMENTS))

    def axpy() -> None:
        out.add_(torch.randn(ELEMENTS), alpha=1e-3)

    add, plain = paired(lambda: add_normal_(out, scale=1e-3, **STREAM), axpy)
    by_row, plain_beside = paired(lambda: add_normal_(out, scale=rows, row_length=1000, **STREAM), axpy)
    return {
        "cpu_fill_s": fill,
        "cpu_randn_s": randn,
        "cpu_fill_speed_of_randn": randn / fill,
        "cpu_add_s": add,
        "cpu_add_speed_of_randn_add": plain / add,
        "cpu_add_by_row_s": by_row,
        "cpu_add_by_row_speed_of_randn_add": plain_beside / by_row,
    }


def on_gpu() -> dict[str, float]:
    """Bandwidth of the fused kernel as a share of a copy's: both read and write every byte once."""
    report = {}
    for dtype in (torch.float32, torch.bfloat16):
        out, source = (torch.zeros(GPU_ELEMENTS, dtype=dtype, device="cuda") for _ in range(2))
        rows = torch.linspace(0.5, 1.0, GPU_ELEMENTS // 1000, device="cuda")
        label = str(dtype).removeprefix("torch.")
        for kind, by in (("add", {"scale": 1e-3}), ("add_by_row", {"scale": rows, "row_length": 1000})):
            ours, copy = paired(
                lambda out=out, by=by: add_normal_(out, **by, **STREAM), lambda o=out, s=source: o.copy_(s)
            )
            report[f"gpu_{kind}_{label}_of_copy_bandwidth"] = copy / ours
        report[f"gpu_copy_{label}_bytes_per_s"] = 2 * out.nbytes / copy
    return report


def run() -> dict[str, object]:
    """Measure, check the CPU target, and return the figures; the GPU's are missing where there is none."""
    report: dict[str, object] = {"threads": torch.get_num_threads(), **on_cpu()}
    if torch.cuda.is_available():
        report |= {"gpu": torch.cuda.get_device_name(), **on_gpu()}
    print(json.dumps(report, indent=2))
    assert report["cpu_fill_speed_of_randn"] >= 0.5, "fill_normal_ must reach half the speed of torch.randn on a CPU"
    return report


if __name__ == "__main__":
    run()
