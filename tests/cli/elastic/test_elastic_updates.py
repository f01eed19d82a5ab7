"""An update of ours, or a method that remembers, in an elastic job, with averages beside it, a batch that grows and a
rate that drops: a death, a newcomer, a stop, and on from the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, Started, command, in_ranks, losses, rows, write_job

STEPS, SAMPLES = 36, 232  # ten steps of 4, seven of 6, nineteen of 8, of which the last takes what is left
SHAPE: dict[str, Any] = {
    "max_steps": SAMPLES // 8, "eval_steps": 9, "save_steps": None, "workers": 2, "export": False,
    "averages": {"swa": {"start": 0.3, "every_samples": 20}, "lawa": {"k": 2, "every_samples": 24}, "ema": {}},
    "evaluate_average": "swa", "global_batch_size": 8,
    "batch_schedule": {"kind": "ramp", "min_global_batch_size": 4, "ramp_samples": 80, "lr_rule": "none"},
    "lr_scheduler_type": "autodrop", "warmup_ratio": 0.0,
    "lr_scheduler_kwargs": {"window_samples": 24, "theta": 180.0, "upper_theta": 180.0, "rho": 0.7, "extra_windows": 2},
}  # fmt: skip
UPDATES: dict[str, dict[str, Any]] = {
    "lars": {"optim": "lars", "learning_rate": 1.0, "momentum": None, "optim_args": {"momentum": 0.9}},
    "lora": {"lora": {"r": 4, "alpha": 8, "target_modules": ["linear"]}},
    "lamb": {"optim": "lamb", "learning_rate": 0.01, "momentum": None},
    "soap": {"optim": "soap", "learning_rate": 0.01, "momentum": None},
    "schedule_free": {
        "optim": "schedule_free", "learning_rate": 0.01, "momentum": None, "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None, "averages": {}, "evaluate_average": None,
    },
    "sophia_g": {"optim": "sophia_g", "learning_rate": 0.01, "momentum": None},
    "muon": {
        "optim": "adamw", "learning_rate": 0.01, "momentum": None,
        "param_groups": [{"match": "blocks.*", "dims": 2, "optim": "muon", "learning_rate": 0.02}],
    },
    "adaptive_memory": {"optim": "adaptive_memory", "learning_rate": 0.01, "momentum": None},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "looksam": {"k": 4}, "friendly_sam": {}, "sampa": {}, "momentum_sam": {"rho": 0.3}, "ae_sam": {},
    "entropy_sgd": {"inner_steps": 2, "gamma1": 0.01}, "esam": {}, "functional_sam": {},
}  # fmt: skip
"""What they remember, or draw and choose by step, with SGD as base."""
UPDATES |= {name: {"landscape": {"method": name, **own}} for name, own in METHODS.items()}
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"backend": "replicated"},
    "fsdp2": {"backend": "fsdp2"},
    **{f"zero{s}": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": s}}} for s in (2, 3)},
}
LIVES = [
    ("zero3", "muon"),
    *(
        pytest.param(*life, marks=pytest.mark.full)
        for life in (
            ("ddp", "muon"), ("fsdp2", "lamb"), ("zero2", "lars"), ("fsdp2", "lora"), ("zero3", "lora"),
            ("ddp", "soap"), ("fsdp2", "sophia_g"), ("zero2", "schedule_free"), ("zero2", "adaptive_memory"),
            ("fsdp2", "looksam"), ("zero3", "friendly_sam"), ("zero2", "sampa"), ("ddp", "momentum_sam"),
            ("fsdp2", "ae_sam"), ("zero3", "entropy_sgd"), ("fsdp2", "esam"), ("zero3", "functional_sam"),
        )
    ),
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "update"), LIVES)
def test_killed_joined_stopped_and_resumed(
    ranks: Callable[[int], Any], tmp_path: Path, backend: str, update: str
) -> None:
    shape = SHAPE | UPDATES[update] | BACKENDS[backend]
    (tmp_path / "alone").mkdir()
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "alone/run.yaml", **shape)))
    wanted = rows(tmp_path / "alone/run")

    run = tmp_path / "run"
    hurry = tmp_path / "hurry"  # else a machine that starts slowly would have a newcomer after the job's end
    slow = {"import": TINY, "args": {"pause_s": 0.1, "hurry_file": str(hurry)}}
    job = write_job(tmp_path / "run.yaml", model=slow, elastic={}, **shape)
    first = Started(command("none", job), tmp_path)
    first.until(lambda: world(run) == 2 and max(rows(run), default=0) >= 6)
    os.kill(first.named_workers()[read_journal(run)[-1]["workers"][0]], signal.SIGKILL)
    first.until(lambda: world(run) == 2 and any(change["gone"] for change in read_journal(run)))
    reached = max(rows(run))
    first.until(lambda: max(rows(run)) >= min(reached + 4, STEPS - 4))
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 0, first.output
    hurry.touch()
    second = Started(command("none", job), tmp_path)
    assert second.wait() == 0, second.output
    found = rows(run)
    assert f"of {STEPS}; the same command goes on" in first.output and "checkpoint-" in second.output, second.output
    # muon rounds to bf16, where another order of a sum may show
    close = 3e-3 if update == "muon" else 1e-4
    for name in ("batch", "lr", "samples"):
        assert [found[s][name] for s in sorted(found)] == pytest.approx([wanted[s][name] for s in sorted(wanted)])
    assert [wanted[s]["batch"] for s in sorted(wanted)] == [4] * 10 + [6] * 7 + [8] * 19
    assert len({row["lr"] for row in wanted.values()}) == (1 if update == "schedule_free" else 4)
    assert losses(run) == pytest.approx([wanted[s]["loss"] for s in sorted(wanted)], rel=close)
    means = {step: row["eval_loss"] for step, row in wanted.items() if "eval_loss" in row}
    assert len(means) == STEPS // SHAPE["eval_steps"]
    assert {step: found[step]["eval_loss"] for step in means} == pytest.approx(means, rel=close)


def world(folder: Path) -> int:
    changes = read_journal(folder)
    return len(changes[-1]["workers"]) if changes else 0
