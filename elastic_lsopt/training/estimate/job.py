"""A job's plan: for each world size its batch, its memory, its communication, its time and its price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastic_lsopt.config.settings import (
    SettingError,
    TrainConfig,
    batch_sizes,
    in_halves,
    landscape_fields,
    lr_rule,
    ranks_that_share,
)
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import part_bounds, slots, unit_sizes
from elastic_lsopt.plan import Policy, Worker, plan
from elastic_lsopt.schedules.batch_scaling import rate_factor
from elastic_lsopt.training.estimate.communication import Passes, sent_per_step
from elastic_lsopt.training.estimate.look import Looked
from elastic_lsopt.training.estimate.offload import on_host
from elastic_lsopt.training.estimate.placement import Placement
from elastic_lsopt.training.estimate.probes import probe_vectors
from elastic_lsopt.training.estimate.rank import RankMemory, memory_of_rank
from elastic_lsopt.training.estimate.replicas import one_replica, replicas_of, sent_between, vectors_of_rule
from elastic_lsopt.training.estimate.state import FP32, average_vectors, mirror_per_rank
from elastic_lsopt.training.pace import vectors_watched

ACCURACY = 0.1
"""What an estimate may miss: a rank fits where its peak and this share of it do."""
MOST_WORLD = 4096
"""Ranks that are tried for a memory."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step on so many ranks."""

    samples: int
    forwards: int
    """Most micro-batches that a rank runs in a pass, idle ones included."""
    learning_rate: float
    """Its peak over the job."""
    held_by: str = ""
    """What kept the policy from the batch that the world would have."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long the job takes at a given speed."""

    hours: float
    price: float | None
    """None: no price was given."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of one rank in forward and backward of a pass, and the price of a rank's hour."""

    tokens_per_second: float
    price_per_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class OnWorld:
    """The job on `world` ranks."""

    world: int
    batch: Batch
    memory: RankMemory
    """On the device."""
    offloaded: RankMemory
    """On the host, where FSDP2 or DeepSpeed has moved it there."""
    host: dict[str, int]
    """Bytes of host memory per rank, for versions of an elastic job's state; empty: it keeps none."""
    sent: dict[str, int]
    """Bytes that a rank sends per step."""
    length: Length | None


def worlds_of(config: TrainConfig, given: Sequence[int]) -> list[int]:
    """The world sizes of a plan: those that are asked for, else powers of two, those of the file among them.

    Of an elastic job those between its bounds; of HSDP those that its replica groups divide. Raises SettingError for
    one that is asked for and cannot be.
    """
    least, most = bounds_of(config)
    step = step_of_worlds(config)
    if not given:
        powers = [2**k for k in range(7)]
        own = least if config.elastic is not None else config.workers
        return sorted({w for w in (*powers, own) if least <= w <= most and w % step == 0} or {own})
    for world in given:
        if world % config.fsdp_replicas:
            raise SettingError("fsdp_replicas", f"fsdp_replicas={config.fsdp_replicas} must divide --worlds {world}.")
        if world % replicas_of(config):
            raise SettingError(
                "consensus.replicas", f"consensus.replicas={replicas_of(config)} must divide --worlds {world}."
            )
        if world % step:
            raise SettingError("landscape.halves", f"landscape.halves: --worlds {world} has no halves; give even ones.")
        if not least <= world <= most:
            raise SettingError("elastic", f"--worlds {world} lies outside the job's {least} to {most} workers.")
    return sorted(set(given))


def step_of_worlds(config: TrainConfig) -> int:
    """What divides each world that the job may have."""
    return (2 if in_halves(config) else config.fsdp_replicas) * replicas_of(config)


def bounds_of(config: TrainConfig) -> tuple[int, int]:
    """The fewest and the most ranks that the job may have."""
    if config.elastic is None:
        return 1, MOST_WORLD
    return config.elastic.min_nodes * config.workers, config.elastic.max_nodes * config.workers


def batch_on(config: TrainConfig, parts: int, world: int) -> Batch:
    """By the job's policy; a job of fixed size keeps its batch; of a schedule of the batch its largest, with its rate.

    Raises SettingError where the policy refuses the world.
    """
    if config.batch_schedule is not None and (most := max(batch_sizes(config))) != config.global_batch_size:
        factor = rate_factor(config.global_batch_size, most, lr_rule(config, config.batch_schedule))
        rate = config.learning_rate * factor
        return batch_on(replace(config, batch_schedule=None, global_batch_size=most, learning_rate=rate), parts, world)
    if config.elastic is None:
        sizes = unit_sizes(config.global_batch_size, config.per_device_train_batch_size)
        ranks = ranks_that_share(config, world)
        forwards = sum(len(slots(bounds, 0, ranks)) for bounds in part_bounds(len(sizes), parts))
        return Batch(samples=config.global_batch_size, forwards=forwards, learning_rate=config.learning_rate)
    try:
        made = plan([Worker(r, "") for r in range(world)], Policy.of(config, parts=parts), SampleClock())
    except UserError as error:
        raise SettingError("elastic", str(error)) from None
    now = made.hyperparameters(SampleClock())
    return Batch(
        samples=now.global_batch_size, forwards=made.accumulation, learning_rate=now.learning_rate, held_by=made.why
    )


def on_world(
    config: TrainConfig, looked: Looked, world: int, *, parts: int = 1, gpu: bool = False, speed: Speed | None = None
) -> OnWorld:
    """The plan of one world size; of replicas each has its share of the ranks, and of the batch."""
    if (replicas := replicas_of(config)) > 1:
        return _of_replicas(config, looked, world // replicas, replicas, parts=parts, gpu=gpu, speed=speed)
    return _on_world(config, looked, world, parts=parts, gpu=gpu, speed=speed)


def _of_replicas(config: TrainConfig, looked: Looked, ranks: int, replicas: int, **more: Any) -> OnWorld:
    one = _on_world(one_replica(config), looked, ranks, consensus=vectors_of_rule(config), **more)
    vector_bytes = FP32 * Placement.of(config, ranks).share(looked.size.parameters)
    length = one.length
    if length is not None and length.price is not None:
        length = replace(length, price=length.price * replicas)
    return replace(
        one, world=ranks * replicas, batch=replace(one.batch, samples=one.batch.samples * replicas), length=length,
        sent={**one.sent, "between replicas": sent_between(config, vector_bytes)},
    )  # fmt: skip


def _on_world(
    config: TrainConfig, looked: Looked, world: int, *, parts: int = 1, gpu: bool = False, speed: Speed | None = None,
    consensus: tuple[int, int] = (0, 0),
) -> OnWorld:  # fmt: skip
    at, batch = Placement.of(config, world), batch_on(config, parts, world)
    method, fields = landscape_fields(config)
    averages, watched = average_vectors(config.averages), vectors_watched(config)
    kept: dict[str, Any] = {"optim": config.optim, "momentum": config.momentum}
    memory = memory_of_rank(
        looked.size, looked.moments, at, method=method, averages=averages, watched=watched, consensus=consensus,
        probes=probe_vectors(config.probes), microbatches=batch.forwards, gpu=gpu and not at.optimizer_on_host, **kept,
    )  # fmt: skip
    device, offloaded = memory.parted(on_host(at))
    passes, elastic = Passes.of(method, fields), config.elastic
    host = {} if elastic is None else mirror_per_rank(
        looked.size.parameters, at, grams=looked.size.grams, copies=elastic.copies,
        budget_bytes=elastic.mirror_gib * 2**30, vectors=averages + watched,
        **kept,
    )  # fmt: skip
    sent = sent_per_step(looked.size, at, microbatches=batch.forwards, passes=passes)
    length = None if speed is None else _length(config, batch, world, passes, speed)
    return OnWorld(world=world, batch=batch, memory=device, offloaded=offloaded, host=host, sent=sent, length=length)


def _length(config: TrainConfig, batch: Batch, world: int, passes: Passes, speed: Speed) -> Length | None:
    """Of max_steps steps at the job's own batch: its samples, whatever the batch is here; None by epochs, whose samples
    only the data know."""
    if config.max_steps is None:
        return None
    tokens = config.block_size if config.task != "classification" else 1
    steps = config.max_steps * config.global_batch_size / batch.samples
    a_step = passes.in_turn * batch.forwards * config.per_device_train_batch_size * tokens / speed.tokens_per_second
    hours = steps * a_step / 3600
    return Length(hours=hours, price=None if speed.price_per_hour is None else hours * world * speed.price_per_hour)


def fits(memory: RankMemory, device_bytes: int) -> bool:
    """Whether a rank's peak fits, with what the estimate may miss."""
    return memory.peak * (1 + ACCURACY) <= device_bytes


def smallest_world(
    config: TrainConfig, looked: Looked, device_bytes: int, *, parts: int = 1, gpu: bool = True
) -> int | None:
    """The fewest ranks on which the job fits; None: not on MOST_WORLD either."""
    least, most = bounds_of(config)
    step = step_of_worlds(config)
    first, last = -(-least // step), min(most, MOST_WORLD) // step

    def right(groups: int) -> bool:
        try:
            return fits(on_world(config, looked, groups * step, parts=parts, gpu=gpu).memory, device_bytes)
        except SettingError:
            return False

    found = groups = first
    while not right(groups):
        if groups >= last:
            return None
        found, groups = groups + 1, min(2 * groups, last)
    # Between the last that was too few and the first that is enough.
    low, high = found, groups
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if right(middle) else (middle + 1, high)
    return low * step


def what_to_change(config: TrainConfig, memory: RankMemory) -> str:
    """What would help most where no world is large enough, by the largest part of a rank's peak."""
    sharded = config.backend == "fsdp2" or (config.backend == "deepspeed" and Placement.of(config, 2).gathers)
    parts = {**memory.kept, **(memory.in_pass or {})}
    largest = max(parts, key=lambda name: parts[name])
    if largest == "activations":
        if not config.activation_checkpointing:
            return "activations are the largest part: set activation_checkpointing: true"
        if config.per_device_train_batch_size > 1:
            return "activations are the largest part: lower per_device_train_batch_size"
        return "activations are the largest part, of one sample: lower block_size"
    if not sharded:
        return f"{largest} are the largest part, and whole on each rank: use backend: fsdp2, or ZeRO stage 3"
    if largest == "frozen weights" and config.lora is not None and Placement.of(config, 2).frozen > 2:
        narrow = "lora.base_dtype: bf16" if config.backend == "fsdp2" else "bf16: true"
        return f"frozen weights are the largest part: set {narrow}"
    at = Placement.of(config, 2)
    for key, moved in (
        ("offload_optimizer", {"optimizer_on_host": True}),
        ("offload_param", {"weights_on_host": True}),
    ):
        if largest in on_host(replace(at, **moved)) - on_host(at):
            where = "fsdp_cpu_offload: true" if at.backend == "fsdp2" else f'"{key}": {{"device": "cpu"}} in its JSON'
            return f"{largest} are the largest part: set {where}"
    if not config.bf16:
        return f"{largest} are the largest part: set bf16: true, or train fewer parameters"
    if largest == "communication buffers":
        return "DeepSpeed's buffers are the largest part: lower reduce_bucket_size in its JSON"
    return f"{largest} are the largest part: take a model with smaller blocks or fewer parameters"
