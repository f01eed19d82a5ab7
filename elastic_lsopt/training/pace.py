"""How fast a job goes along: the batch and the learning rate of each step, on committed samples.

    rate = LearningRate(clock) * AutoDrop's factor * that of rewinds, times what the rule makes of the batch

What of this is measured on the way is in state families (`watchers`), so that it is saved, mirrored and moved with the
rest; nothing here remembers anything.
"""

from __future__ import annotations

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.config.schedules import LOWER_LR, BatchScheduleConfig
from elastic_lsopt.config.settings import SettingError, TrainConfig, batch_sizes, lr_rule
from elastic_lsopt.elastic.worker.rates import Rates
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import BatchAt, steps_between
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.microbatch import part_bounds
from elastic_lsopt.plan import Plan
from elastic_lsopt.schedules.adascale import GainMonitor, measured
from elastic_lsopt.schedules.autodrop import AutoDrop, dropped
from elastic_lsopt.schedules.batch_scaling import Rule, scaling
from elastic_lsopt.schedules.batch_schedule import Ramp, Steps
from elastic_lsopt.schedules.group_rates import GroupRates
from elastic_lsopt.schedules.learning_rate import LearningRate
from elastic_lsopt.schedules.noise_scale_batch import NoiseScaleBatch, batch_now

GAIN_BATCHES = 1000
"""Batches over which AdaScale's gain is smoothed."""
NOISE_BATCHES = 100
"""Batches between two looks at the noise scale, and over which it is smoothed, where the settings say nothing."""


def watchers(config: TrainConfig, epoch: int) -> list[Stateful]:
    """The families that the job's schedules read; an epoch has so many samples. Raises UserError for what they
    refuse."""
    kept: list[Stateful] = []
    batch, rate = config.batch_schedule, config.lr_scheduler_kwargs
    if config.lr_scheduler_type == "autodrop":
        own = {} if rate is None else rate.given()
        lower, window = own.pop("lower_lr", LOWER_LR), own.pop("window_samples", epoch)
        lowest = min(1.0, lower / config.learning_rate) if config.learning_rate else 1.0
        kept.append(AutoDrop(window_samples=window, lowest=lowest, **own))
    if batch is not None and batch.kind == "noise_scale":
        smallest, largest = batch.sizes(config.global_batch_size)
        horizon = NOISE_BATCHES * config.global_batch_size
        given = {name: getattr(batch, name) for name in ("multiple", "hysteresis", "growth")}
        kept.append(
            NoiseScaleBatch(
                smallest=smallest, largest=largest, microbatch=config.per_device_train_batch_size,
                every_samples=batch.every_samples or horizon, horizon_samples=batch.horizon_samples or horizon,
                may_shrink=batch.may_shrink, **{name: value for name, value in given.items() if value is not None},
            )
        )  # fmt: skip
    elif batch is not None and _adascale(config, batch):
        kept.append(gain_monitor(config))
    return kept


def gain_monitor(config: TrainConfig) -> GainMonitor:
    return GainMonitor(horizon_samples=GAIN_BATCHES * config.global_batch_size)


class Pace:
    """The batch and the rate of an engine's steps. Raises UserError for a batch with fewer micro-batches than the
    method's parts, Unsupported for a batch that the rate's rule does not permit."""

    def __init__(self, config: TrainConfig, engine: Engine, plan: Plan | None, *, rehearsal: bool = False) -> None:
        self._config, self._engine = config, engine
        block, own = config.batch_schedule, config.lr_scheduler_kwargs
        self._block = None if block is None or block.kind == "constant" else block
        given = {} if own is None or config.lr_scheduler_type == "autodrop" else own.given()
        shape = "constant" if config.lr_scheduler_type == "autodrop" else config.lr_scheduler_type
        self._rate = LearningRate(peak=config.learning_rate, shape=shape, warmup=config.warmup_ratio, **given)
        own = plan is None or config.consensus is not None  # whose plan is of one replica
        self._fixed = config.global_batch_size if own or plan is None else plan.global_batch_size
        self._peaks = [group["lr"] for group in engine.param_groups]
        self._rates: Rates | None = None
        self._at: BatchAt | None = None
        self._counted = (-1, 0)
        """A cursor, and the steps from there to the end: counted once, and then one less per step."""
        if self._block is not None:
            self._rule: Rule = lr_rule(config, self._block)
            reference = config.global_batch_size
            sizes = batch_sizes(config)
            refuse_parts(config, engine.method.parts)
            self._groups = GroupRates(
                engine.param_groups, reference, self._rule, sizes,
                "use batch_schedule.lr_rule: linear or none, or batches nearer to global_batch_size.",
            )  # fmt: skip
            self._at = self._planned(sizes, engine.clock.total_samples or 0)
        elif plan is not None and not rehearsal:  # which keeps nothing that measures
            self._rates = Rates(engine, plan)

    def _planned(self, sizes: tuple[int, ...], total_samples: int) -> BatchAt | None:
        """The batch as a function of committed samples; None where it is measured."""
        block = self._block
        assert block is not None
        if block.kind == "ramp":
            assert block.ramp_samples is not None
            microbatch = self._config.per_device_train_batch_size
            return Ramp(first=sizes[0], last=sizes[1], samples=block.ramp_samples, microbatch=microbatch).at
        if block.kind == "steps":
            when = [s["at_samples"] if "at_samples" in s else s["at"] * total_samples for s in block.steps]
            return Steps(first=sizes[0], changes=tuple(zip(when, sizes[1:], strict=True))).at
        return None

    def batch_at(self, samples: int) -> int:
        """Samples of the step that begins there; where it is measured, as it was decided last."""
        if self._at is not None:
            return self._at(samples)
        if self._block is not None:
            return batch_now(self._engine.families, batch_sizes(self._config)[0])
        return self._fixed

    def steps_from(self, samples: int, end: int) -> int:
        """Steps from there to the end of the job; where the batch is measured, if it stays as it is."""
        if self._at is None:
            return -(-(end - samples) // self.batch_at(samples))
        before, steps = self._counted
        if samples != before:
            one_later = steps and samples == before + self._at(before)
            steps = steps - 1 if one_later else steps_between(self._at, samples, end)
            self._counted = samples, steps
        return steps

    def set_rate(self, factor: float) -> float:
        """The learning rate of the step that begins now, in every param group; `factor` is that of rewinds."""
        engine = self._engine
        share = self._rate.share(engine.clock) * dropped(engine.families) * factor
        if self._rates is not None:
            return self._rates.set(share)
        if self._block is not None:
            reference, batch = self._config.global_batch_size, self.batch_at(engine.clock.samples)
            factors = scaling(reference, batch, self._rule, gain=measured(engine.families))
            return self._groups.set(engine.param_groups, factors, batch, share)
        for group, peak in zip(engine.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        return self._config.learning_rate * share


def refuse_parts(config: TrainConfig, parts: int) -> None:
    """Raise SettingError for a batch of the schedule with fewer micro-batches than the method's parts."""
    for batch in batch_sizes(config):
        try:
            part_bounds(-(-batch // config.per_device_train_batch_size), parts)
        except UserError as error:
            raise SettingError("batch_schedule", f"batch_schedule: of a batch of {batch} samples: {error}") from None


def vectors_watched(config: TrainConfig) -> int:
    """Vectors that the schedules' families keep: AutoDrop's two, the gain's one."""
    block, elastic = config.batch_schedule, config.elastic
    noise = block is not None and (block.kind == "noise_scale" or _adascale(config, block))
    scaled = elastic is not None and elastic.policy == "scale_batch" and lr_rule(config, elastic) == "adascale"
    return 2 * (config.lr_scheduler_type == "autodrop") + (noise or scaled)


def _adascale(config: TrainConfig, block: BatchScheduleConfig) -> bool:
    return block.kind != "constant" and lr_rule(config, block) == "adascale"


def batches_told(config: TrainConfig) -> str:
    """What banners say of a step's samples: 32, or 32 to 256."""
    sizes = batch_sizes(config)
    return f"{min(sizes)} to {max(sizes)}" if len({*sizes}) > 1 else str(sizes[0])
