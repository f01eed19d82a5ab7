"""The blocks `lr_scheduler_kwargs` and `batch_schedule`: how the learning rate and the batch go along the run.

    LrSchedulerKwargs(decay_ratio=0.2)                                    with lr_scheduler_type="warmup_stable_decay"
    BatchScheduleConfig(kind="ramp", min_global_batch_size=32, ramp_samples=100_000)

Both count committed samples: a change of the world, a resume or another batch does not move them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.elastic import Rule
from elastic_lsopt.config.ranges import BLOCK, Count, Flag, NotNegative, Positive, SettingError

AtMostOne = Annotated[float, Field(gt=0, le=1, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
NotBelowOne = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]

OF_SHAPE: dict[str, tuple[str, ...]] = {
    "warmup_stable_decay": ("decay_ratio", "decay_type", "min_lr_ratio"),
    "inverse_sqrt": ("timescale_samples",),
    "autodrop": ("window_samples", "theta", "upper_theta", "rho", "lower_lr", "extra_windows"),
}
"""Which keys each lr_scheduler_type takes; the others take none."""
LOWER_LR = 1e-4
"""autodrop's, where the settings say nothing."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class LrSchedulerKwargs:
    """What a schedule has of its own; null: the schedule's default."""

    decay_ratio: AtMostOne | None = None
    """warmup_stable_decay: share of the job's samples, its last ones, over which the rate falls; null: 0.1."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    """warmup_stable_decay: how it falls; null: 1-sqrt."""
    min_lr_ratio: Share | None = None
    """warmup_stable_decay: the share of the peak at which it ends; null: 0."""
    timescale_samples: Count | None = None
    """inverse_sqrt: samples after the warm-up at which the rate is its peak over sqrt 2; null: those of the warm-up."""
    window_samples: Count | None = None
    """autodrop: samples between two looks at where the weights have gone; null: an epoch. A run of one epoch needs a
    smaller number."""
    theta: Positive | None = None
    """autodrop: degrees; a turn of the weights that changes by less in a window has saturated; null: 0.01."""
    upper_theta: Positive | None = None
    """autodrop: most degrees that theta grows to, by 1 / rho with each drop; null: 1."""
    rho: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    """autodrop: factor on the rate with each drop; null: 0.2."""
    lower_lr: NotNegative | None = None
    """autodrop: the rate below which it does not drop, less than learning_rate; null: 1e-4, which is meant for SGD."""
    extra_windows: Count | None = None
    """autodrop: windows from the one that has saturated to the drop, both counted; null: 20."""

    def given(self) -> dict[str, Any]:
        """What is not null."""
        return {name: value for name, value in vars(self).items() if name in FIELDS and value is not None}


FIELDS = tuple(LrSchedulerKwargs.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class BatchScheduleConfig:
    """The global batch along the run. Raises as `TrainConfig` does."""

    kind: Literal["constant", "steps", "ramp", "noise_scale"] = "constant"
    """constant: global_batch_size; steps: others from given samples on; ramp: from min_global_batch_size to
    max_global_batch_size over ramp_samples; noise_scale: as large as the measured gradient noise makes worth while."""
    steps: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """steps: [{at: 0.5, global_batch_size: 64}, …], `at` a share of the job's samples, or `at_samples` a number of
    them; global_batch_size before the first."""
    min_global_batch_size: Count | None = None
    """ramp: where it begins; noise_scale: the smallest, where it begins too; null: global_batch_size."""
    max_global_batch_size: Count | None = None
    """ramp: where it ends; null: global_batch_size. noise_scale, which needs it: the largest."""
    ramp_samples: Count | None = None
    """ramp, which needs it: samples over which the batch grows, in whole micro-batches."""
    multiple: Positive | None = None
    """noise_scale: the batch over the noise scale B_noise = tr(S) / |G|^2 that is aimed at; null: 1."""
    every_samples: Count | None = None
    """noise_scale: samples between two looks, at each of which the batch may change; null: 100 times
    global_batch_size."""
    horizon_samples: Positive | None = None
    """noise_scale: samples after which a measurement's weight has fallen to 1/e; null: 100 times global_batch_size."""
    hysteresis: NotBelowOne | None = None
    """noise_scale: the batch stays unless it would change by at least this factor; null: 1.25."""
    growth: Annotated[float, Field(gt=1, allow_inf_nan=False, strict=True)] | None = None
    """noise_scale: largest factor of one change; null: 2."""
    may_shrink: Flag = False
    """noise_scale: also let the batch fall again."""
    lr_rule: Rule | None = None
    """How the rate follows the batch, with k the batch over global_batch_size, for which learning_rate was chosen:
    linear, sqrt, adascale, none, as elastic.lr_rule; null: linear for sgd and lars, else sqrt."""

    def __post_init__(self) -> None:
        for key, message in _conflicts(self):
            raise SettingError(f"batch_schedule.{key}" if key else "batch_schedule", message)

    def sizes(self, global_batch_size: int) -> tuple[int, ...]:
        """The batches that bound it, the first one first; `global_batch_size` is the job's."""
        match self.kind:
            case "steps":
                return (global_batch_size, *(step["global_batch_size"] for step in self.steps))
            case "ramp" | "noise_scale":
                first = self.min_global_batch_size or global_batch_size
                return first, self.max_global_batch_size or global_batch_size
        return (global_batch_size,)


OF_KIND: dict[str, tuple[str, ...]] = {
    "constant": (),
    "steps": ("steps", "lr_rule"),
    "ramp": ("min_global_batch_size", "max_global_batch_size", "ramp_samples", "lr_rule"),
    "noise_scale": (
        "min_global_batch_size", "max_global_batch_size", "multiple", "every_samples", "horizon_samples", "hysteresis",
        "growth", "may_shrink", "lr_rule",
    ),
}  # fmt: skip


def _conflicts(b: BatchScheduleConfig) -> Iterator[tuple[str, str]]:
    for key, f in b.__dataclass_fields__.items():
        if key != "kind" and key not in OF_KIND[b.kind] and getattr(b, key) not in (f.default, ()):
            kinds = " and ".join(kind for kind, keys in OF_KIND.items() if key in keys)
            yield key, f"{key} is for kind {kinds}, but kind={b.kind}; remove the key."
    if b.kind == "steps":
        yield from _step_conflicts(b.steps)
    if b.kind == "ramp" and b.ramp_samples is None:
        yield "ramp_samples", "kind=ramp needs ramp_samples: the samples over which the batch grows."
    if b.kind == "ramp" and b.min_global_batch_size is None and b.max_global_batch_size is None:
        yield "", "kind=ramp needs min_global_batch_size, max_global_batch_size or both: where it begins and ends."
    if (growth := b.growth or 2.0) < (hysteresis := b.hysteresis or 1.25):
        yield "growth", f"growth={growth:g} is below hysteresis={hysteresis:g}, so the batch would never change."
    if b.kind == "noise_scale" and b.max_global_batch_size is None:
        yield (
            "max_global_batch_size",
            "kind=noise_scale needs max_global_batch_size: memory, time and the rate's rule are planned for it.",
        )


def _step_conflicts(steps: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, str]]:
    if not steps:
        yield "steps", "kind=steps needs steps, such as [{at: 0.5, global_batch_size: 64}]."
    before: float = 0
    for i, step in enumerate(steps):
        key, own = f"batch_schedule.steps[{i}]", {"at", "at_samples"} & {*step}
        if len(own) != 1 or {*step} != own | {"global_batch_size"}:
            yield "steps", f"{key}={dict(step)} must be one of at and at_samples, and global_batch_size."
            return
        [which] = own
        if which not in steps[0]:
            yield "steps", f"{key} says {which} and the first does not; give all of them as shares or all in samples."
            return
        at, batch = step[which], step["global_batch_size"]
        kind: Any = int if which == "at_samples" else int | float
        if isinstance(at, bool) or not isinstance(at, kind) or at <= before or (which == "at" and at >= 1):
            limit = "a share below 1" if which == "at" else "a whole number"
            yield "steps", f"{key}.{which}={at!r} must be {limit}, above {before:g}, the one before."
            return
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            yield "steps", f"{key}.global_batch_size={batch!r} must be an integer >= 1."
            return
        before = at
