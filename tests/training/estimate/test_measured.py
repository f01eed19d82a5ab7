"""What engines keep and send, counted in real processes of each backend, beside the estimate of the same job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_memory import SAM, job, zero
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.estimate.job import on_world
from elastic_lsopt.training.estimate.look import look_at_model
from tests.processes.ranks import Ranks


def plain(backend: str, **more: Any) -> dict[str, Any]:
    return {"backend": backend, **more}


SETTINGS = {
    "ddp": plain("replicated", landscape=SAM),
    "fsdp2": plain("fsdp2", landscape=SAM),
    "zero2": plain("deepspeed", deepspeed=zero(2), landscape=SAM),
    "fsdp2_checkpointing": plain("fsdp2", activation_checkpointing=True),
    "fsdp2_kept_gathered": plain("fsdp2", fsdp_reshard_after_forward=False),
    "fsdp2_bf16": plain("fsdp2", bf16=True),
    "zero1": plain("deepspeed", deepspeed=zero(1), landscape=SAM),
    "zero1_bf16": plain("deepspeed", deepspeed=zero(1), bf16=True),
    "zero3": plain("deepspeed", deepspeed=zero(3)),
    "zero3_bf16": plain("deepspeed", deepspeed=zero(3), bf16=True),
    "zero0": plain("deepspeed", deepspeed=zero(0)),
}
DAILY = ("fsdp2", "zero2", "zero3")
ROWS = [pytest.param(name, marks=() if name in DAILY else pytest.mark.full) for name in SETTINGS]


@pytest.mark.parametrize("name", ROWS)
def test_kept_and_sent(ranks: Callable[[int], Ranks], name: str, tmp_path: Path) -> None:
    found = ranks(2).run("tests.cases.estimate:kept_and_sent", settings=SETTINGS[name])[0]
    config = job(SETTINGS[name], tmp_path, toy=True)
    ours = on_world(config, look_at_model(config), 2)
    kept = {name: size for name, size in ours.memory.kept.items() if size}
    kept["gradient"] = kept.pop("gradient buffer", 0)
    if "fsdp2" in name or name == "ddp":
        kept["gradient"] = ours.memory.in_step["gradient"]  # there until the next pass begins
    assert found["kept"] == pytest.approx({name: kept.get(name, 0) for name in found["kept"]}, rel=0.01), name
    told = {kind: size for kind, size in ours.sent.items() if size}
    assert found["sent"] == pytest.approx(told, rel=0.03), name


def test_a_job_of_one_rank_sends_nothing(tmp_path: Path) -> None:
    config: TrainConfig = job(SETTINGS["fsdp2"], tmp_path, toy=True)
    assert set(on_world(config, look_at_model(config, passes=False), 1).sent.values()) == {0}
