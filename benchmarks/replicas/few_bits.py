"""Two bits with error feedback, an exchange each 32 steps, beside synchronous data parallelism: bytes, held-out loss.

Four replicas, as jobs of `elastic-lsopt train`, on the same samples, rates and steps as one job on the whole batch,
which is what synchronous data parallelism computes. Over the seeds, the synchronous loss has a mean and its 95 %
interval (Student's t); the replicas' mean is to lie in it or below. With 32 bits too, so that what drifting costs is
told from what rounding does.

    digits    a perceptron of 4,810 parameters, SGD, 1,600 steps of 64; replicas take the mean of their weights
    lm        a Llama of 43 thousand parameters on Python's standard library, AdamW, 640 steps of 128, from one model
              that 400 steps of 32 have trained, as in the papers; DiLoCo, as the mean of weights is further behind

Bytes are those of the numbers that travel, by the run's own count (`replica_traffic` holds it against the wire);
synchronous data parallelism reduces as many numbers per step as an exchange in 32 bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.machine import ROOT
from elastic_lsopt.study.interval import interval
from tests.processes.ranks import rank_environment

REPLICAS, TAU, LIMIT_S = 4, 32, 3600.0
SEEDS = {"digits": range(5), "lm": range(3)}
RULES: dict[str, dict[str, Any]] = {
    "digits": {"rule": "local_sgd"}, "lm": {"rule": "diloco", "lr": 1.0, "momentum": 0.5},
}  # fmt: skip
COMMON: dict[str, Any] = {"backend": "replicated", "resume_from_checkpoint": "none", "lr_scheduler_type": "cosine"}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "task": "classification", "dataset": "digits", "eval_fraction": 0.5,
        "model": {
            "import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 64, "classes": 10}
        },
        "per_device_train_batch_size": 16, "global_batch_size": 64, "max_steps": 1600, "optim": "sgd", "momentum": 0.9,
        "learning_rate": 0.05, "max_grad_norm": 0,
    },
    "lm": {
        "dataset": "python-stdlib", "block_size": 64, "per_device_train_batch_size": 32, "global_batch_size": 128,
        "max_steps": 640, "eval_batches": 16, "optim": "adamw", "learning_rate": 0.02, "warmup_ratio": 0.05,
        "weight_decay": 0.1, "adam_beta2": 0.95,
    },
}  # fmt: skip
BEGIN: dict[str, dict[str, Any]] = {
    "lm": {
        "model": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "global_batch_size": 32, "max_steps": 400, "learning_rate": 0.01, "seed": 100,
    }
}  # fmt: skip
"""How the model is trained from which a task begins."""
EXACT = 32
BITS = (EXACT, 2)


def job(folder: Path, **settings: Any) -> Path:
    """The run's folder when it has ended. Raises RuntimeError with what it said where it failed."""
    folder.mkdir(parents=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**COMMON, **settings, "output_dir": str(folder / "run")}))
    done = subprocess.run(
        [str(Path(sys.executable).parent / "elastic-lsopt"), "train", str(file)], cwd=ROOT, env=rank_environment(),
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return folder / "run"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_of(run: Path) -> float:
    return [row["eval_loss"] for row in rows(run) if "eval_loss" in row][-1]


def sent_bytes(run: Path) -> list[int]:
    """By one replica, in each exchange."""
    told = {row["exchange"]["number"]: row["exchange"]["sent_bytes"] for row in rows(run) if "exchange" in row}
    return [told[number] for number in sorted(told)]


def consensus(task: str, bits: int) -> dict[str, Any]:
    return {**RULES[task], "replicas": REPLICAS, "tau": TAU, "exchange": {"bits": bits}}


def compare(task: str, seeds: Sequence[int], **changes: Any) -> dict[str, Any]:
    """Figures of one task: losses, their intervals, and bytes of those of synchronous data parallelism."""
    settings = {**TASKS[task], **changes}
    losses: dict[str, list[float]] = {"synchronous": [], **{f"{bits}_bits": [] for bits in BITS}}
    shares: dict[int, list[float]] = {bits: [] for bits in BITS}
    with tempfile.TemporaryDirectory(prefix="bench-bits-") as name:
        folder = Path(name)
        if task in BEGIN:
            begun = job(folder / "begin", **{**settings, **BEGIN[task]})
            settings["model_name_or_path"] = str(begun / "model")
        for seed in seeds:
            begin = time.perf_counter()
            own = {**settings, "seed": seed, "export": False}
            run = job(folder / f"synchronous-{seed}", **own)
            losses["synchronous"].append(loss_of(run))
            whole = 0  # bytes of all numbers as they are
            for bits in BITS:
                run = job(folder / f"{bits}-{seed}", **own, workers=REPLICAS, consensus=consensus(task, bits))
                losses[f"{bits}_bits"].append(loss_of(run))
                each = sent_bytes(run)
                whole = each[0] if bits == EXACT else whole
                shares[bits].append(sum(each) / (whole * settings["max_steps"]))
            last = {name: round(each[-1], 4) for name, each in losses.items()}
            print(task, seed, last, f"{time.perf_counter() - begin:.0f} s", flush=True)
    of_synchronous = interval(losses["synchronous"])
    high = of_synchronous.mean + of_synchronous.half
    figures: dict[str, Any] = {f"{task}_seeds": len(seeds)}
    for name, each in losses.items():
        found = interval(each)
        figures[f"{task}_{name}_loss"] = found.mean
        figures[f"{task}_{name}_loss_spread"] = [found.mean - found.half, found.mean + found.half]
    for bits in BITS:
        figures[f"{task}_{bits}_bits_loss_beyond_interval"] = max(0.0, fmean(losses[f"{bits}_bits"]) - high)
        figures[f"{task}_{bits}_bits_bytes_of_synchronous"] = fmean(shares[bits])
    return figures


def run() -> dict[str, Any]:
    return {name: value for task, seeds in SEEDS.items() for name, value in compare(task, seeds).items()}
