"""The one plan of a generation: who runs which micro-batches, how large the batch is, what the hyper-parameters are.

    before = plan(workers, policy, clock)                             generation 1
    now    = plan(fewer, policy, clock, before=before, gain=gain)     generation 2, from the samples of its clock on
    now.microbatches_of_rank[rank]                                    this rank's micro-batches of every step
    now.hyperparameters(clock).into_group(group, schedule=…)          before every step

keep_batch: the global batch and every hyper-parameter stay as they are, to the bit, at any world size.
scale_batch: the micro-batches a worker stay, so the batch B follows the world, and the hyper-parameters follow B by the
rule (`schedules/batch_scaling.py`), in a straight line over `ramp_samples` committed samples after each change. Bounds
on batch and rate, Adam's betas under sqrt (k (1 - beta) < 1) and the method's parts are held by accumulation: more or
fewer micro-batches a worker than the policy would give; `Plan.why` says so.

A pure function of its arguments: every rank computes the same plan, nobody sends one.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, Literal

from pydantic import TypeAdapter

from elastic_lsopt.config.settings import (
    ADAMS,
    BY_FORM,
    DECOUPLED,
    TrainConfig,
    batch_sizes,
    landscape_fields,
    lr_rule,
)
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import part_bounds
from elastic_lsopt.schedules.adascale import Gain
from elastic_lsopt.schedules.batch_scaling import Hyperparameters, Rule, Scaling, blend, permits, rate_factor, scaling

WORTH = 0.95
"""Unequal shares must shorten a step to this share of its time: measured speeds are never quite equal."""
ULPS = 1e-9
"""A rate that equals its bound but for rounding keeps it."""


@dataclass(frozen=True)
class Worker:
    """A rank of the generation that is planned."""

    rank: int
    node: str
    samples_per_second: float | None = None
    """As measured, > 0; None: not yet."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the job's file says about batch and rate, for its whole life."""

    reference: Hyperparameters
    """The job's own, for its own global batch."""
    microbatch_size: int
    """Samples in a micro-batch."""
    kind: Literal["keep_batch", "scale_batch"] = "keep_batch"
    reference_workers: int | None = None
    """Workers that the reference was chosen for; scale_batch needs it."""
    rule: Rule = "none"
    betas: tuple[tuple[float, float], ...] = ()
    """Of other param groups than the reference's, which bound the batch under sqrt as its own do."""
    parts: int = 1
    """The method's parts: a step has at least so many micro-batches."""
    ramp_samples: int = 0
    min_global_batch_size: int | None = None
    max_global_batch_size: int | None = None
    min_learning_rate: float | None = None
    max_learning_rate: float | None = None
    max_accumulation: int | None = None
    largest_batch: int | None = None
    """Under keep_batch with a schedule of the batch: its largest, for which max_accumulation is meant."""
    may_balance: bool = False
    """Unequal shares by measured speed: for backends whose ranks need not run equally many forwards (replicated)."""

    def __post_init__(self) -> None:
        if self.kind == "keep_batch":
            part_bounds(-(-self.reference.global_batch_size // self.microbatch_size), self.parts)
            return
        batch, microbatch, workers = self.reference.global_batch_size, self.microbatch_size, self.reference_workers
        if workers is None or batch % (microbatch * workers):
            raise UserError(
                f"global_batch_size={batch} must be a multiple of the micro-batch of {microbatch} samples x "
                f"reference_workers={workers}: under scale_batch the micro-batches a worker stay."
            )
        if broken := self.breaks(batch // microbatch, None):
            raise UserError(f"the job's own global_batch_size={batch} breaks {broken}; widen the bound.")

    def breaks(self, microbatches: int, gain: Gain | None) -> str:
        """The bound that a step of so many micro-batches would break; empty: none."""
        own, batch = self.reference, microbatches * self.microbatch_size
        rate = own.learning_rate * rate_factor(own.global_batch_size, batch, self.rule, gain)
        bounds = (
            (microbatches >= self.parts, f"parts={self.parts}"),
            (batch >= (self.min_global_batch_size or 0), f"min_global_batch_size={self.min_global_batch_size}"),
            (batch <= (self.max_global_batch_size or batch), f"max_global_batch_size={self.max_global_batch_size}"),
            (rate >= (self.min_learning_rate or 0.0) * (1 - ULPS), f"min_learning_rate={self.min_learning_rate}"),
            (rate <= (self.max_learning_rate or rate) * (1 + ULPS), f"max_learning_rate={self.max_learning_rate}"),
            *(
                (permits(own, batch, self.rule, betas), f"the rule sqrt (k (1 - beta) < 1 for betas={betas})")
                for betas in (own.betas, *self.betas)
            ),
        )
        return next((what for kept, what in bounds if not kept), "")

    @classmethod
    def of(cls, config: TrainConfig, *, parts: int = 1) -> Policy:
        """The policy of a job; `parts` are those of its method. Raises ValueError for a job that is not elastic."""
        elastic = config.elastic
        if elastic is None:
            raise ValueError("the job has no elastic block.")
        adam = config.optim in ADAMS
        own = config.optim_args
        first, *others = betas_of(config)
        method = landscape_fields(config)[1]
        bounds = ("min_global_batch_size", "max_global_batch_size", "min_learning_rate", "max_learning_rate")
        return cls(
            reference=Hyperparameters(
                global_batch_size=config.global_batch_size,
                learning_rate=config.learning_rate,
                betas=first,
                epsilon=config.adam_epsilon if adam else own.get("eps"),
                momentum=config.momentum if config.optim == "sgd" else own.get("momentum"),
                weight_decay=config.weight_decay,
                decoupled_weight_decay=config.optim in DECOUPLED
                or (config.optim in BY_FORM and own.get("form") != "sgd"),
                rho=method.get("rho"),
                gamma=method.get("gamma"),
            ),
            microbatch_size=config.per_device_train_batch_size,
            kind=elastic.policy,
            reference_workers=elastic.reference_workers,
            rule="none" if elastic.policy == "keep_batch" else lr_rule(config, elastic),
            betas=tuple(b for b in others if b is not None),
            parts=parts,
            ramp_samples=elastic.ramp_samples,
            max_accumulation=elastic.max_accumulation,
            largest_batch=None if config.batch_schedule is None else max(batch_sizes(config)),
            may_balance=config.backend == "replicated",
            **{name: getattr(elastic, name) for name in bounds},
        )


ADAMLIKE, BETAS = ("lamb", "nadam", "radam", "adamax"), (0.9, 0.999)
OWN_BETAS = {**dict.fromkeys(ADAMLIKE, BETAS), "soap": (0.95, 0.95)}
"""What optimizers with Adam's two moments, but without his keys in a job, have where the file says nothing; of those
that the square-root rule serves."""


def betas_of(config: TrainConfig) -> list[tuple[float, float] | None]:
    """The betas of the job, then of each rule of `param_groups`, then of AdamW beside Muon."""
    adams = (config.adam_beta1, config.adam_beta2)

    def of(optim: str, own: Mapping[str, Any]) -> tuple[float, float] | None:
        given = own.get("betas", adams if optim in ADAMS else OWN_BETAS.get(optim))
        return None if given is None else (float(given[0]), float(given[1]))

    rules = [(str(g.get("optim", config.optim)), g.get("optim_args", {})) for g in config.param_groups]
    beside = [adams] if "muon" in (config.optim, *(optim for optim, _ in rules)) else []
    return [of(config.optim, config.optim_args), *(of(optim, given) for optim, given in rules), *beside]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A generation's plan. `to_json` and `from_json` carry it through a checkpoint, so that a ramp goes on."""

    global_batch_size: int
    microbatch_size: int
    world: int
    parts: int
    speeds: tuple[float, ...] | None
    """Samples a second of each rank where shares are unequal; None: dealt out evenly."""
    rule: Rule
    reference: Hyperparameters
    start: Scaling
    """Where the ramp begins."""
    target: Scaling
    """Where it ends."""
    since_samples: int
    ramp_samples: int
    why: str
    """What the policy held, and by what; empty: nothing stood in its way."""
    rate_bounds: tuple[float | None, float | None] = (None, None)
    """Of the peak rate; adascale's gain goes on changing after the batch was planned."""

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step, the last of which may be smaller."""
        return -(-self.global_batch_size // self.microbatch_size)

    @property
    def k(self) -> float:
        """The global batch over the reference's."""
        return self.global_batch_size / self.reference.global_batch_size

    @cached_property
    def microbatches_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """Each rank's micro-batches, whole and in order of index; together every micro-batch once."""
        return deal(self.microbatches, self.speeds or (1.0,) * self.world)

    @property
    def slots(self) -> tuple[int, ...]:
        """Forwards of each rank in a pass over the batch, idle ones included; equally many at even shares."""
        bounds = part_bounds(self.microbatches, self.parts)
        if self.speeds is None:
            return (sum(-(-(end - first) // self.world) for first, end in bounds),) * self.world
        return tuple(
            sum(max(1, sum(first <= u < end for u in mine)) for first, end in bounds)
            for mine in self.microbatches_of_rank
        )

    @property
    def accumulation(self) -> int:
        """The most forwards that any rank runs in a pass."""
        return max(self.slots)

    def with_gain(self, gain: Gain | None) -> Plan:
        """The same plan, its target by a newer measurement of AdaScale's gain; under other rules, or without one, self.

        The rate stays within its bounds: the batch was planned for an older gain.
        """
        if self.rule != "adascale" or gain is None or not self.reference.learning_rate:
            return self
        own, (low, high) = self.reference, self.rate_bounds
        rates = (low or 0.0) / own.learning_rate, (high or inf) / own.learning_rate
        target = scaling(own.global_batch_size, self.global_batch_size, self.rule, gain=gain, rates=rates)
        return replace(self, target=target)

    def scaling(self, now: SampleClock) -> Scaling:
        """The factors on the reference's hyper-parameters in the step that begins at `now`."""
        if not self.ramp_samples:
            return self.target
        return blend(self.start, self.target, (now.samples - self.since_samples) / self.ramp_samples)

    def hyperparameters(self, now: SampleClock) -> Hyperparameters:
        """What the step that begins at `now` takes; a function of committed samples and nothing else."""
        return self.scaling(now).of(self.reference, self.global_batch_size)

    def to_json(self) -> dict[str, Any]:
        return _AS_JSON.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError where it is none."""
        return _AS_JSON.validate_json(json.dumps(value), strict=True)


_AS_JSON = TypeAdapter(Plan)


def plan(
    workers: Sequence[Worker],
    policy: Policy,
    clock: SampleClock,
    *,
    before: Plan | None = None,
    gain: Gain | None = None,
) -> Plan:
    """The plan of these workers from `clock` on; `before` is the one that ran until there.

    `gain` is AdaScale's, as measured so far; with a newer one the same workers may be planned again at any step. Raises
    UserError for a world too small for its batch (max_accumulation), ValueError for ranks that are not 0 … n-1.
    """
    if sorted(w.rank for w in workers) != list(range(len(workers))) or not workers:
        raise ValueError(f"ranks {[w.rank for w in workers]} must be 0 to {len(workers) - 1}, each once.")
    world, own = len(workers), policy.reference
    if policy.kind == "keep_batch":
        batch, why, target = own.global_batch_size, "", Scaling()
    else:
        batch, why = _batch(world, policy, gain)
        target = scaling(own.global_batch_size, batch, policy.rule, gain=gain)
    speeds = _speeds(workers, -(-batch // policy.microbatch_size)) if policy.may_balance else None
    start, since = target, clock.samples
    if before is not None and policy.ramp_samples:
        # The same target: the ramp that is under way goes on. Another: from wherever that one has come to.
        same = before.target == target
        start, since = (before.start, before.since_samples) if same else (before.scaling(clock), clock.samples)
    made = Plan(
        global_batch_size=batch, microbatch_size=policy.microbatch_size, world=world, parts=policy.parts, speeds=speeds,
        rule=policy.rule, reference=own, start=start, target=target, since_samples=since,
        ramp_samples=policy.ramp_samples, why=why,
        rate_bounds=(policy.min_learning_rate, policy.max_learning_rate),
    )  # fmt: skip
    batch = max(batch, policy.largest_batch or 0) if policy.kind == "keep_batch" else batch
    accumulation = replace(made, global_batch_size=batch).accumulation
    if policy.max_accumulation is not None and accumulation > policy.max_accumulation:
        raise UserError(
            f"a world of {world} worker(s) is too small for a global batch of {batch}: each would run "
            f"{accumulation} micro-batches of {policy.microbatch_size} a step, "
            f"max_accumulation={policy.max_accumulation}; start more workers, raise max_accumulation or lower "
            "the batch."
        )
    return made


def _batch(world: int, policy: Policy, gain: Gain | None) -> tuple[int, str]:
    """scale_batch: the global batch nearest to the workers' own share that every bound permits, and what held it.

    The reference keeps every bound, and each bound holds on one side of some batch: so the batches that keep all are
    an interval around the reference's, and its end towards the wanted one is found by halving.
    """
    own, microbatch = policy.reference, policy.microbatch_size
    kept = own.global_batch_size // microbatch
    wanted = kept * world // (policy.reference_workers or 1)
    if not policy.breaks(wanted, gain):
        return wanted * microbatch, ""
    beyond = wanted
    while abs(beyond - kept) > 1:
        middle = (beyond + kept) // 2
        kept, beyond = (kept, middle) if policy.breaks(middle, gain) else (middle, beyond)
    return (
        kept * microbatch,
        f"{policy.breaks(beyond, gain)} held by {'fewer' if wanted > kept else 'more'} micro-batches a worker",
    )


def deal(microbatches: int, speeds: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Whole micro-batches, each to the rank that would end first with it: the slowest ends as early as whole
    micro-batches allow.

    Micro-batches are equal, so the greedy choice is the best one (uniform machines, equal jobs). At equal speeds
    micro-batch u goes to rank u mod world.
    """
    mine: list[list[int]] = [[] for _ in speeds]
    ends = [(1 / speed, rank) for rank, speed in enumerate(speeds)]
    heapq.heapify(ends)
    for microbatch in range(microbatches):
        _, rank = ends[0]
        mine[rank].append(microbatch)
        heapq.heapreplace(ends, ((len(mine[rank]) + 1) / speeds[rank], rank))
    return tuple(map(tuple, mine))


def _speeds(workers: Sequence[Worker], microbatches: int) -> tuple[float, ...] | None:
    """Samples a second by rank; None where one is not known, or where no step would end noticeably earlier."""
    in_order = sorted(workers, key=lambda w: w.rank)
    speeds = [w.samples_per_second for w in in_order if w.samples_per_second and w.samples_per_second > 0]
    if len(speeds) < len(workers):
        return None
    balanced, even = (
        max(len(mine) / speed for mine, speed in zip(deal(microbatches, by), speeds, strict=True))
        for by in (speeds, [1.0] * len(speeds))
    )
    return tuple(speeds) if balanced < WORTH * even else None
