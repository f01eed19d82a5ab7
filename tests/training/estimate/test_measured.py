"""What engines keep and send, counted in real processes of each backend, beside the estimate of the same job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_memory import FLAT, LORA, OPTIMIZER, SAM, WEIGHTS, job, zero
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
    "fsdp2_lora": plain("fsdp2", lora=LORA, landscape=SAM),
    "fsdp2_lora_bf16": plain("fsdp2", lora=LORA | {"base_dtype": "bf16"}, bf16=True),
    "fsdp2_lora_bf16_base": plain("fsdp2", lora=LORA | {"base_dtype": "bf16"}, **FLAT),
    "ddp_lora_flat": plain("replicated", lora=LORA | {"base_dtype": "bf16"}, **FLAT),
    "zero2_lora": plain("deepspeed", deepspeed=zero(2), lora=LORA, **FLAT),
    "zero3_lora_bf16": plain("deepspeed", deepspeed=zero(3), lora=LORA | {"base_dtype": "bf16"}, bf16=True),
    "fsdp2_offload": plain("fsdp2", fsdp_cpu_offload=True, landscape=SAM),
    "zero1_offload": plain("deepspeed", deepspeed=zero(1, OPTIMIZER)),
    "zero2_offload": plain("deepspeed", deepspeed=zero(2, OPTIMIZER), landscape=SAM),
    "zero2_offload_bf16": plain("deepspeed", deepspeed=zero(2, OPTIMIZER), bf16=True),
    "zero3_offload": plain("deepspeed", deepspeed=zero(3, OPTIMIZER | WEIGHTS), landscape=SAM),
    "zero3_offload_bf16_lora": plain("deepspeed", deepspeed=zero(3, OPTIMIZER | WEIGHTS), bf16=True, lora=LORA),
}
DAILY = ("fsdp2", "zero2", "zero3", "fsdp2_lora_bf16_base", "zero2_offload")
ROWS = [pytest.param(name, marks=() if name in DAILY else pytest.mark.full) for name in SETTINGS]


@pytest.mark.parametrize("name", ROWS)
def test_kept_and_sent(ranks: Callable[[int], Ranks], name: str, tmp_path: Path) -> None:
    found = ranks(2).run("tests.cases.estimate:kept_and_sent", settings=SETTINGS[name])[0]
    config = job(SETTINGS[name], tmp_path, toy=True)
    ours = on_world(config, look_at_model(config), 2)
    # On a CPU the device's memory is the host's.
    kept = {name: size for place in (ours.memory, ours.offloaded) for name, size in place.kept.items() if size}
    kept["gradient"] = kept.pop("gradient buffer", 0)
    if "fsdp2" in name or "ddp" in name:
        step = ours.memory.in_step | ours.offloaded.in_step
        kept["gradient"] = step["gradient"]  # there until the next pass begins
    if "sum of gradients" in kept:  # and the rest of a parameter that the cut goes through
        summed = found["kept"].pop("sum of gradients")
        assert 0 <= summed - kept["sum of gradients"] <= kept["buffer of a gradient on its way"]
    assert found["kept"] == pytest.approx({name: kept.get(name, 0) for name in found["kept"]}, rel=0.01), name
    told = {kind: size for kind, size in ours.sent.items() if size}
    assert found["sent"] == pytest.approx(told, rel=0.03), name


def test_a_job_of_one_rank_sends_nothing(tmp_path: Path) -> None:
    config: TrainConfig = job(SETTINGS["fsdp2"], tmp_path, toy=True)
    assert set(on_world(config, look_at_model(config, passes=False), 1).sent.values()) == {0}
