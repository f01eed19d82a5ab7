"""The batch and the rate along a job: the same at any world size, after a resume, and by the rule that is named."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Run, in_ranks, losses, rows, write_job

BASE: dict[str, Any] = {
    "global_batch_size": 8, "max_steps": 20, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0, "landscape": {"method": "none"}, "eval_steps": None, "save_steps": None, "export": False,
}  # fmt: skip
RAMP = {"kind": "ramp", "min_global_batch_size": 4, "max_global_batch_size": 16, "ramp_samples": 70}
NOISE = {
    "kind": "noise_scale", "min_global_batch_size": 4, "max_global_batch_size": 24, "every_samples": 20,
    "horizon_samples": 60.0, "multiple": 12.0,
}  # fmt: skip
AUTODROP = {"window_samples": 16, "theta": 30.0, "upper_theta": 60.0, "rho": 0.5, "extra_windows": 2}


def batches(folder: Path) -> list[int]:
    return [row["batch"] for _, row in sorted(rows(folder).items())]


def rates(folder: Path) -> list[float]:
    return [row["lr"] for _, row in sorted(rows(folder).items())]


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5), ("none", 0.0)])
def test_a_ramp_is_the_same_steps_at_any_world_size(run: Run, folder: Path, rule: str, power: float) -> None:
    """Law 5: every rank count takes the same batches; the rate is the rule's; each sample comes once."""
    wanted, taken = [], 0
    while taken < 160:
        wanted.append(min(4 + taken * 6 // 70 * 2, 16))
        taken += wanted[-1]
    found = {}
    for world in (1, 2, 3) if rule == "sqrt" else (2,):
        name = f"ramp-{rule}-{world}"
        run(world, write_job(folder / f"{name}.yaml", **BASE, batch_schedule=RAMP | {"lr_rule": rule}))
        found[world] = losses(folder / name)
        assert batches(folder / name) == wanted
        assert rates(folder / name) == pytest.approx([0.05 * (b / 8) ** power for b in wanted])
        assert max(row["samples"] for row in rows(folder / name).values()) == 160
    assert all(other == pytest.approx(found[2], rel=1e-5) for other in found.values())


def test_steps_by_shares_of_the_job(run: Run, folder: Path) -> None:
    steps = [{"at": 0.25, "global_batch_size": 12}, {"at": 0.6, "global_batch_size": 4}]
    schedule = {"kind": "steps", "steps": steps, "lr_rule": "linear"}
    run(2, write_job(folder / "steps.yaml", **BASE, batch_schedule=schedule))
    # 40 samples by 8, then by 12 until at least 96 (there are 100), then by 4 to 160
    assert batches(folder / "steps") == [8] * 5 + [12] * 5 + [4] * 15
    assert rates(folder / "steps") == pytest.approx([0.05] * 5 + [0.075] * 5 + [0.025] * 15)


@pytest.mark.parametrize("rule", ["adascale", "sqrt"])
def test_a_measured_batch_goes_on_after_a_resume(run: Run, folder: Path, rule: str) -> None:
    """Bit by bit on the same layout; the decisions, and so the batches, at another world size too."""
    shape = BASE | {"batch_schedule": NOISE | {"lr_rule": rule}, "save_steps": 6}
    shape |= {"lr_scheduler_type": "autodrop", "lr_scheduler_kwargs": AUTODROP, "averages": {"swa": {"start": 0.3}}}
    whole = folder / f"whole-{rule}"
    run(2, write_job(whole.with_suffix(".yaml"), **shape))
    taken = batches(whole)
    assert taken == sorted(taken) and taken[0] == 4 < taken[-1] and all(batch % 2 == 0 for batch in taken)
    for world in (2, 3):
        half = folder / f"half-{rule}-{world}"
        shutil.copytree(whole, half)
        for checkpoint in (half / "checkpoints").iterdir():
            if checkpoint.name != "checkpoint-6":
                shutil.rmtree(checkpoint)
        (half / "metrics.jsonl").unlink()
        run(world, write_job(half.with_suffix(".yaml"), **shape))
        assert batches(half) == taken[6:]
        if world == 2:
            assert losses(half) == losses(whole)[6:] and rates(half) == rates(whole)[6:]
        else:
            assert losses(half) == pytest.approx(losses(whole)[6:], rel=1e-5)
            assert rates(half) == pytest.approx(rates(whole)[6:], rel=1e-5)
    assert len({*rates(whole)}) > 2 and math.isfinite(losses(whole)[-1])


def test_autodrop_lowers_the_rate_and_not_below(run: Run, folder: Path) -> None:
    """With theta at 180 degrees each window is saturated: a drop at the end of every second one, from the third on."""
    own = {"window_samples": 16, "theta": 180.0, "upper_theta": 180.0, "rho": 0.5, "extra_windows": 2, "lower_lr": 0.01}
    shape = BASE | {"lr_scheduler_type": "autodrop", "lr_scheduler_kwargs": own}
    run(2, write_job(folder / "drops.yaml", **shape))
    # Angles exist from the second window on, changes of them from the third: it and the fourth make the wait.
    assert rates(folder / "drops") == pytest.approx([0.05] * 8 + [0.025] * 4 + [0.0125] * 4 + [0.01] * 4)


def test_a_worker_warms_up_without_what_measures(ranks: Any, folder: Path) -> None:
    """It keeps no family then, which is no reason to refuse adascale, a measured batch or AutoDrop."""
    scaled = {"elastic": {"policy": "scale_batch", "reference_workers": 2, "lr_rule": "adascale"}}
    measured = {"elastic": {}, "batch_schedule": NOISE | {"lr_rule": "adascale"}, "lr_scheduler_type": "autodrop"}
    for number, shape in enumerate((scaled, measured)):
        job = write_job(folder / f"rehearsal-{number}.yaml", **BASE | shape)
        [found] = in_ranks(ranks, 1, "rehearsal", path=str(job))
        assert found == {"rule": ("adascale", "none")[number], "families": ["method"]}


def test_parts_that_the_smallest_batch_cannot_be_cut_into(ranks: Any, folder: Path) -> None:
    own = {"landscape": {"method": "lpf_sgd", "parts": 4}, "batch_schedule": RAMP}
    for said in in_ranks(ranks, 2, "refused", path=str(write_job(folder / "parts.yaml", **BASE | own))):
        assert "of a batch of 4 samples: a step of 2 micro-batch(es) cannot be cut into 4 part(s)" in said
