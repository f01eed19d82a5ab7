"""`elastic-lsopt plan FILE.yaml`: what a job takes on each world size, before it runs.

Memory per rank by part, on the device and on the host; batch and rate by the job's policy; the bytes that a rank sends;
what fits in a given GPU; time and price at a given speed. Neither a GPU nor weights nor data nor a process group is
needed: the model is built on the meta device, and a micro-batch runs on tensors that have a shape and no storage.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.cli.terminal.tables import (
    console_of_tables,
    host_table,
    memory_table,
    rank_name,
    said_of_size,
    table,
    unit_of,
    uses_host,
)
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.training.building.imported_model import foreign_code
from elastic_lsopt.training.estimate.job import (
    ACCURACY,
    MOST_WORLD,
    OnWorld,
    Speed,
    fits,
    on_world,
    smallest_world,
    what_to_change,
    worlds_of,
)
from elastic_lsopt.training.estimate.look import Looked, look_at_model

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's own options."""

    worlds: str | None = None
    gpu_memory: str | None = None
    tokens_per_second: float | None = None
    price_per_hour: float | None = None
    as_json: bool = False
    trust: bool = False


def plan_job(path: str, overrides: Sequence[str], asked: Asked) -> int:
    """Print the plan, or with `as_json` one object; returns 0, or 1 where it fits on no world.

    Raises UserError, one line with the place, for whatever is wrong.
    """
    given, device_bytes, speed = _worlds(asked.worlds), _memory(asked.gpu_memory), _speed(asked)
    job = read_job(path, overrides, imports=asked.trust)
    with job.file.located():
        code = {} if asked.trust else foreign_code(job.config)
        if code:
            raise UserError(f"{next(iter(code.values()))} is code of the job's own; --trust runs it, to know its size.")
        worlds = worlds_of(job.config, given)
        looked = look_at_model(job.config, job.method)
        gpu = _on_gpu(device_bytes)
        parts = job.method.parts
        ours = [on_world(job.config, looked, world, parts=parts, gpu=gpu, speed=speed) for world in worlds]
        least = None
        if device_bytes is not None:
            least = smallest_world(job.config, looked, device_bytes, parts=parts)
            if least is not None and least not in worlds and not given:
                added = on_world(job.config, looked, least, parts=parts, gpu=gpu, speed=speed)
                ours = sorted([*ours, added], key=lambda one: one.world)
    if asked.as_json:
        print(json.dumps(_as_json(path, job.config, looked, ours, device_bytes, least), indent=2))
    else:
        _print(path, job.config, looked, ours, gpu=gpu)
        if device_bytes is not None:
            print(_fit_line(job.config, ours, device_bytes, least))
    return int(device_bytes is not None and least is None)


def _on_gpu(device_bytes: int | None) -> bool:
    """Whether the plan is for GPUs: one was named, or is here."""
    import torch

    return device_bytes is not None or torch.cuda.is_available()


# -- what is asked -----------------------------------------------------------------------------------------------------


def _worlds(text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"\d+(,\d+)*", text) or not all(0 < int(n) <= MOST_WORLD for n in text.split(",")):
        raise UserError(f"--worlds {text} must be numbers of ranks from 1 to {MOST_WORLD}, such as 8,16,32.")
    return [int(n) for n in text.split(",")]


def _memory(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.upper())
    if found is None or not float(found[1]):
        raise UserError(f"--gpu-memory {text} must be a size such as 80GiB or 24GB.")
    return int(float(found[1]) * SIZES[found[2]])


def _speed(asked: Asked) -> Speed | None:
    for name in ("tokens_per_second", "price_per_hour"):
        value = getattr(asked, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be a number > 0.")
    if asked.tokens_per_second is None:
        if asked.price_per_hour is not None:
            raise UserError("--price-per-hour needs --tokens-per-second: the speed of one rank.")
        return None
    return Speed(tokens_per_second=asked.tokens_per_second, price_per_hour=asked.price_per_hour)


# -- what is said ------------------------------------------------------------------------------------------------------


def _print(path: str, config: TrainConfig, looked: Looked, ours: Sequence[OnWorld], *, gpu: bool) -> None:
    console, size = console_of_tables(), looked.size
    where = "GPUs" if gpu else "CPUs"
    console.print(f"{path}: {config.task}, {said_of_size(size)}, {_backend(config)} on {where}")
    console.print(_steps_table(console, config, ours))
    for one in ours:
        if one.batch.held_by:
            console.print(f" {one.world} ranks: {one.batch.held_by}")
    console.print(memory_table(console, config, ours))
    if uses_host(ours):
        console.print(host_table(console, config, ours))
    if looked.why:
        console.print(
            f"Activations are not counted: the model cannot run without numbers ({looked.why}).", markup=False
        )
    if config.max_steps is None and any(one.length is None for one in ours):
        console.print("Time and price need max_steps: how many samples an epoch has, only the data know.")
    console.print(f"* = workers of this file. Not counted: {'the driver, fragments' if gpu else 'the framework'}.")


def _backend(config: TrainConfig) -> str:
    from elastic_lsopt.config.deepspeed_json import read_deepspeed_json, zero_stage

    if config.deepspeed is None:
        return config.backend
    return f"deepspeed (ZeRO stage {zero_stage(read_deepspeed_json(config.deepspeed))})"


def _steps_table(console: Console, config: TrainConfig, ours: Sequence[OnWorld]) -> Table:
    unit, unit_bytes = unit_of(max(sum(one.sent.values()) for one in ours))
    timed = [one.length for one in ours if one.length is not None]
    priced = any(length.price is not None for length in timed)
    made = table(
        console, "A step", [
            "ranks", "batch", "forwards per pass", "peak rate", f"gathers, {unit}", f"reductions, {unit}",
            *(["hours"] if timed else []), *(["price"] if priced else []),
        ],
    )  # fmt: skip
    for one in ours:
        length = one.length
        made.add_row(
            rank_name(one.world, config), str(one.batch.samples), str(one.batch.forwards),
            f"{one.batch.learning_rate:.3g}", f"{one.sent['weights'] / unit_bytes:,.2f}",
            f"{one.sent['gradients'] / unit_bytes:,.2f}", *([f"{length.hours:,.1f}"] if length else []),
            *([f"{length.price:,.2f}"] if length and length.price is not None else []),
        )  # fmt: skip
    return made


def _fit_line(config: TrainConfig, ours: Sequence[OnWorld], device_bytes: int, least: int | None) -> str:
    unit, unit_bytes = unit_of(device_bytes)
    room = f"{device_bytes / unit_bytes:,.1f} {unit} per GPU, {ACCURACY:.0%} of the peak left free"
    if least is None:
        return f"Fits on no world up to {MOST_WORLD} ranks in {room}: {what_to_change(config, ours[-1].memory)}."
    return f"Fits from {least} rank{'s' if least > 1 else ''} on, in {room}."


def _as_json(
    path: str, config: TrainConfig, looked: Looked, ours: Sequence[OnWorld], device_bytes: int | None, least: int | None
) -> dict[str, Any]:
    worlds = [
        {
            "world": one.world, "global_batch_size": one.batch.samples, "forwards_per_pass": one.batch.forwards,
            "learning_rate": one.batch.learning_rate, "held_by": one.batch.held_by,
            "device_bytes": {**vars(one.memory), "peak": one.memory.peak},
            "offloaded_bytes": {**vars(one.offloaded), "peak": one.offloaded.peak},
            "host_bytes": one.host, "sent_bytes_per_step": one.sent,
            "hours": None if one.length is None else one.length.hours,
            "price": None if one.length is None else one.length.price,
            "fits": None if device_bytes is None else fits(one.memory, device_bytes),
        }
        for one in ours
    ]  # fmt: skip
    told = {
        "file": path, "parameters": looked.size.parameters, "frozen_parameters": looked.size.frozen,
        "backend": _backend(config),
        "activations_unknown": looked.why, "worlds": worlds,
    }  # fmt: skip
    if device_bytes is not None:
        told |= {"gpu_bytes": device_bytes, "smallest_world": least}
        told["change"] = "" if least is not None else what_to_change(config, ours[-1].memory)
    return told
