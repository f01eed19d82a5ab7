"""The plan: what stays under keep_batch, what follows under scale_batch, what holds the bounds, how a ramp runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import slots
from elastic_lsopt.plan import Plan, Policy, Worker, deal, plan
from elastic_lsopt.schedules.adascale import Gain
from elastic_lsopt.schedules.batch_scaling import Hyperparameters

pytestmark = pytest.mark.fast

ADAMW = Hyperparameters(
    global_batch_size=32, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1, ema_decay=0.999,
    decoupled_weight_decay=True,
)  # fmt: skip
KEEP = Policy(reference=ADAMW, microbatch_size=2)
SCALE = Policy(
    reference=ADAMW,
    microbatch_size=2,
    kind="scale_batch",
    reference_workers=4,
    rule="sqrt",
)
START = SampleClock()


def workers(world: int, speeds: Any = None) -> list[Worker]:
    return [Worker(r, f"node{r // 2}", speeds[r] if speeds else None) for r in range(world)]


def at(samples: int) -> SampleClock:
    return SampleClock(samples=samples, steps=samples // 32)


# -- who runs what -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@given(world=st.integers(1, 16), units=st.integers(1, 40), parts=st.integers(1, 6))
def test_units_are_dealt_whole_and_forwards_are_equally_many(world: int, units: int, parts: int) -> None:
    parts = min(parts, units)
    made = plan(
        workers(world), replace(KEEP, reference=replace(ADAMW, global_batch_size=2 * units), parts=parts), START
    )
    assert sorted(u for mine in made.microbatches_of_rank for u in mine) == list(range(units))
    assert made.microbatches_of_rank == tuple(tuple(range(rank, units, world)) for rank in range(world))
    bounds = [(units * p // parts, units * (p + 1) // parts) for p in range(parts)]
    for rank in range(world):
        assert made.slots[rank] == sum(len(slots(b, rank, world)) for b in bounds) == made.accumulation


def test_seven_workers_on_sixteen_units_run_three_forwards_each() -> None:
    made = plan(workers(7), KEEP, START)
    assert (made.microbatches, made.accumulation, made.slots) == (16, 3, (3,) * 7)
    assert [len(mine) for mine in made.microbatches_of_rank] == [3, 3, 2, 2, 2, 2, 2]


@settings(max_examples=60)
@given(speeds=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=3), units=st.integers(1, 7))
def test_no_other_share_lets_the_slowest_end_earlier(speeds: list[float], units: int) -> None:
    shares = [len(mine) for mine in deal(units, speeds)]
    best = min(
        max(n / speed for n, speed in zip(counts, speeds, strict=True))
        for counts in product(range(units + 1), repeat=len(speeds))
        if sum(counts) == units
    )
    assert sum(shares) == units
    assert max(n / speed for n, speed in zip(shares, speeds, strict=True)) == pytest.approx(best)


@given(speeds=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6))
def test_unequal_shares_are_a_partition_too(speeds: list[float]) -> None:
    made = plan(workers(len(speeds), speeds), replace(KEEP, may_balance=True), START)
    assert sorted(u for mine in made.microbatches_of_rank for u in mine) == list(range(16))
    if made.speeds is not None:
        assert made.slots == tuple(max(1, len(mine)) for mine in made.microbatches_of_rank)


def test_speeds_count_only_where_they_may_and_where_they_tell() -> None:
    fast = [3.0, 1.0, 1.0, 1.0]
    balanced = plan(workers(4, fast), replace(KEEP, may_balance=True), START)
    # Nine units at speed 3 end with three at speed 1; dealt evenly, the slow ones would run four.
    assert [len(mine) for mine in balanced.microbatches_of_rank] == [9, 3, 2, 2] and balanced.accumulation == 9
    for policy, speeds in ((KEEP, fast), (replace(KEEP, may_balance=True), [1.0, 1.01, 0.99, 1.0]),
                           (replace(KEEP, may_balance=True), [3.0, 1.0, 1.0, None])):  # fmt: skip
        even = plan(workers(4, speeds), policy, START)
        assert even.speeds is None and [len(mine) for mine in even.microbatches_of_rank] == [4, 4, 4, 4]


# -- keep_batch --------------------------------------------------------------------------------------------------------


@given(worlds=st.lists(st.integers(1, 16), min_size=1, max_size=6), ramp=st.integers(0, 500))
def test_keep_batch_changes_no_bit_at_any_world(worlds: list[int], ramp: int) -> None:
    before = None
    for n, world in enumerate(worlds):
        before = plan(workers(world), replace(KEEP, ramp_samples=ramp), at(32 * n), before=before)
        for samples in (32 * n, 32 * n + 160, 10**6):
            assert before.hyperparameters(at(samples)) == ADAMW
    assert before is not None and before.global_batch_size == 32 and before.k == 1 and before.why == ""


# -- scale_batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "batch", "k"), [(1, 8, 0.25), (4, 32, 1), (7, 56, 1.75), (16, 128, 4)])
def test_the_units_a_worker_stay_and_the_rest_follows_the_rule(world: int, batch: int, k: float) -> None:
    made = plan(workers(world), SCALE, START)
    now = made.hyperparameters(START)
    assert (made.global_batch_size, made.k, made.slots, made.why) == (batch, k, (4,) * world, "")
    assert now.learning_rate == pytest.approx(1e-3 * k**0.5)
    assert now.betas == pytest.approx((1 - 0.1 * k, 1 - 0.001 * k))
    assert now.epsilon == pytest.approx(1e-8 / k**0.5)
    assert now.weight_decay == pytest.approx(0.1 * k**0.5)
    assert now.ema_decay == pytest.approx(0.999**k)


@given(first=st.integers(1, 16), second=st.integers(1, 16), third=st.integers(1, 16))
def test_where_one_comes_from_does_not_matter(first: int, second: int, third: int) -> None:
    before = None
    for world in (first, second, third):
        before = plan(workers(world), SCALE, START, before=before)
    assert before == plan(workers(third), SCALE, START)


BOUNDS = {
    "min_global_batch_size": 24,
    "max_global_batch_size": 90,
    "min_learning_rate": 8e-4,
    "max_learning_rate": 1.5e-3,
}


@given(
    world=st.integers(1, 64),
    rule=st.sampled_from(["linear", "sqrt", "adascale", "none"]),
    bounds=st.sets(st.sampled_from(sorted(BOUNDS))),
    gain=st.sampled_from([None, Gain(64.0, 1.0)]),
    parts=st.sampled_from([1, 8]),
)
def test_no_bound_is_ever_broken_and_the_batch_is_the_nearest_that_keeps_them(
    world: int, rule: Any, bounds: set[str], gain: Gain | None, parts: int
) -> None:
    policy = replace(SCALE, rule=rule, parts=parts, **{name: BOUNDS[name] for name in bounds})

    def keeps(units: int) -> bool:
        """Each bound written out."""
        batch, k = 2 * units, units / 16
        var, sqr = (gain.variance / 32, gain.square) if gain else (0.0, 1.0)
        rate = 1e-3 * {"linear": k, "sqrt": k**0.5, "adascale": (var + sqr) / (var / k + sqr), "none": 1.0}[rule]
        return (
            units >= parts
            and ("min_global_batch_size" not in bounds or batch >= 24)
            and ("max_global_batch_size" not in bounds or batch <= 90)
            and ("min_learning_rate" not in bounds or rate >= 8e-4 * (1 - 1e-9))
            and ("max_learning_rate" not in bounds or rate <= 1.5e-3 * (1 + 1e-9))
            and (rule != "sqrt" or k * 0.1 < 1 - 1e-9)
        )

    made = plan(workers(world), policy, START, gain=gain)
    wanted = 4 * world
    assert made.microbatches == min((u for u in range(1, 600) if keeps(u)), key=lambda u: (abs(u - wanted), u))
    assert bool(made.why) == (made.microbatches != wanted)
    assert sorted(u for mine in made.microbatches_of_rank for u in mine) == list(range(made.microbatches))


@pytest.mark.parametrize(
    ("world", "changes", "batch", "why"),
    [
        (1, {"min_global_batch_size": 24}, 24, "min_global_batch_size=24 held by more micro-batches a worker"),
        (16, {"max_global_batch_size": 90}, 90, "max_global_batch_size=90 held by fewer micro-batches a worker"),
        (1, {"parts": 8}, 16, "parts=8 held by more micro-batches a worker"),
        (8, {"rule": "linear", "max_learning_rate": 1.5e-3}, 48, "max_learning_rate=0.0015 held by fewer"),
        (3, {"rule": "linear", "min_learning_rate": 1e-3}, 32, "min_learning_rate=0.001 held by more"),
        (64, {}, 318, "the rule sqrt (k (1 - beta) < 1 for betas=(0.9, 0.999)) held by fewer micro-batches a worker"),
    ],
)
def test_the_plan_says_what_held_it(world: int, changes: dict[str, Any], batch: int, why: str) -> None:
    made = plan(workers(world), replace(SCALE, **changes), START)
    assert made.global_batch_size == batch and made.why.startswith(why)


def test_adascale_takes_the_gain_there_is() -> None:
    policy = replace(SCALE, rule="adascale", reference=replace(ADAMW, decoupled_weight_decay=False))
    assert plan(workers(16), policy, START).hyperparameters(START).learning_rate == 1e-3
    made = plan(workers(16), policy, START, gain=Gain(variance=32.0, square=1.0))
    assert made.hyperparameters(START).learning_rate == pytest.approx(1e-3 * 2 / (1 / 4 + 1))
    assert made.hyperparameters(START).betas == ADAMW.betas


# -- the ramp ----------------------------------------------------------------------------------------------------------


def test_a_ramp_is_a_line_in_committed_samples() -> None:
    policy = replace(SCALE, ramp_samples=1000)
    before = plan(workers(4), policy, START)
    made = plan(workers(16), policy, at(3200), before=before)
    shares = {3200: 0.0, 3450: 0.25, 3700: 0.5, 4200: 1.0, 99999: 1.0}
    for samples, share in shares.items():
        now = made.hyperparameters(SampleClock(samples=samples, steps=7))
        assert now.learning_rate == pytest.approx(1e-3 * (1 + share))
        assert now.betas == pytest.approx((0.9 - 0.3 * share, 0.999 - 0.003 * share))
    assert made.hyperparameters(at(3200)).global_batch_size == 128  # the batch is what the world runs


changes = st.lists(st.tuples(st.integers(1, 32), st.integers(0, 1500)), min_size=1, max_size=8)


@given(changes=changes, ramp=st.integers(0, 2000), rule=st.sampled_from(["linear", "sqrt", "none"]))
def test_no_change_makes_a_jump_and_every_ramp_ends(changes: Any, ramp: int, rule: Any) -> None:
    """Also in the middle of a ramp, also back again: from the present value on."""
    policy, samples = replace(SCALE, ramp_samples=ramp, rule=rule), 0
    before = plan(workers(4), policy, START)
    for world, later in changes:
        samples += later
        made = plan(
            workers(world), policy, at(samples), before=Plan.from_json(json.loads(json.dumps(before.to_json())))
        )
        old, new = before.hyperparameters(at(samples)), made.hyperparameters(at(samples))
        if ramp:
            assert replace(new, global_batch_size=0) == replace(old, global_batch_size=0)
        alone = plan(workers(world), policy, START).hyperparameters(START)
        assert made.hyperparameters(at(samples + ramp)) == alone
        before = made


def test_the_same_workers_again_neither_start_nor_prolong_a_ramp() -> None:
    policy = replace(SCALE, ramp_samples=1000)
    made = plan(workers(16), policy, at(0), before=plan(workers(4), policy, START))
    assert plan(workers(16), policy, at(320), before=made) == made


# -- adascale: r = (S/B + G) / (S/B' + G), arXiv 2007.05105 ------------------------------------------------------------

ADASCALE = replace(SCALE, rule="adascale")


def r(gain: Gain, larger: int, batch: int = 32) -> float:
    return (gain.variance / batch + gain.square) / (gain.variance / larger + gain.square)


def test_the_rate_follows_the_measured_gain_within_its_bounds() -> None:
    noisy, calm = Gain(variance=640.0, square=1.0), Gain(variance=1.0, square=1.0)
    made = plan(workers(16), ADASCALE, START, gain=noisy)
    assert made.global_batch_size == 128
    for gain in (noisy, calm):
        now = made.with_gain(gain).hyperparameters(START)
        assert now.learning_rate == pytest.approx(1e-3 * r(gain, 128))
        # AdamW's decay per sample, rate x decay / batch, stays.
        assert now.learning_rate * now.weight_decay / 128 == pytest.approx(1e-3 * ADAMW.weight_decay / 32)
    held = plan(workers(16), replace(ADASCALE, max_learning_rate=2e-3), START, gain=calm).with_gain(noisy)
    assert held.hyperparameters(START).learning_rate == pytest.approx(2e-3) and r(noisy, 128) > 2
    assert made.with_gain(None) is made and plan(workers(16), SCALE, START).with_gain(noisy).rule == "sqrt"


def test_a_ramp_under_adascale_begins_at_the_rate_that_was_measured() -> None:
    policy, gain = replace(ADASCALE, ramp_samples=1000), Gain(variance=64.0, square=1.0)
    before = plan(workers(8), policy, START, gain=gain)
    made = plan(workers(16), policy, at(6400), before=before.with_gain(gain), gain=gain)
    for samples, share in {6400: 0.0, 6900: 0.5, 7400: 1.0}.items():
        expected = 1e-3 * ((1 - share) * r(gain, 64) + share * r(gain, 128))
        assert made.with_gain(gain).hyperparameters(at(samples)).learning_rate == pytest.approx(expected)


# -- the file, and what is refused -------------------------------------------------------------------------------------


def config(**changes: Any) -> TrainConfig:
    least = {"dataset": "python-stdlib", "output_dir": "runs/a", "model": {"model_type": "llama"}, "max_steps": 10}
    return TrainConfig(**{**least, "elastic": {}, **changes})  # type: ignore[arg-type]


def test_the_policy_of_a_file() -> None:
    elastic = {"policy": "scale_batch", "reference_workers": 2, "ramp_samples": 9, "max_learning_rate": 1.0}
    policy = Policy.of(config(elastic=elastic, landscape={"method": "sam", "rho": 0.1}), parts=2)
    assert policy == Policy(
        reference=Hyperparameters(
            global_batch_size=32, learning_rate=5e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, rho=0.1,
            decoupled_weight_decay=True,
        ),
        microbatch_size=8, kind="scale_batch", reference_workers=2, rule="sqrt", parts=2,
        ramp_samples=9, max_learning_rate=1.0, may_balance=True,
    )  # fmt: skip
    ramp = {"kind": "ramp", "max_global_batch_size": 64, "ramp_samples": 100}
    assert Policy.of(config(batch_schedule=ramp)).largest_batch == 64
    sgd = Policy.of(config(optim="sgd", momentum=0.9, backend="fsdp2"))
    assert (sgd.reference.momentum, sgd.reference.betas, sgd.rule, sgd.may_balance) == (0.9, None, "none", False)
    with pytest.raises(ValueError, match="elastic"):
        Policy.of(config(elastic=None))


def test_what_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a world of 1 worker.* too small for a global batch of 32: .* 16 micro-batches of 2"
    ):
        plan(workers(1), replace(KEEP, max_accumulation=15), START)
    plan(workers(2), replace(KEEP, max_accumulation=8), START)
    with pytest.raises(UserError, match=r"a world of 2 worker.* too small for a global batch of 64: .* 16 micro-b"):
        plan(workers(2), replace(KEEP, max_accumulation=8, largest_batch=64), START)
    with pytest.raises(UserError, match="cannot be cut into 17"):
        replace(KEEP, parts=17)
    with pytest.raises(UserError, match="multiple of the micro-batch of 2 samples x reference_workers=3"):
        replace(SCALE, reference_workers=3)
    with pytest.raises(UserError, match="global_batch_size=32 breaks max_global_batch_size=30"):
        replace(SCALE, max_global_batch_size=30)
    for ranks in ([], [0, 0], [1]):
        with pytest.raises(ValueError, match="each once"):
            plan([Worker(r, "a") for r in ranks], KEEP, START)


@pytest.mark.parametrize("change", [{"k": 1}, {"units": "x"}, {"global_batch_size": "many"}, {"speeds": 3}])
def test_what_is_no_plan(change: dict[str, Any]) -> None:
    good = plan(workers(2, [1.0, 5.0]), replace(KEEP, may_balance=True), START)
    assert Plan.from_json(json.loads(json.dumps(good.to_json()))) == good and good.speeds == (1.0, 5.0)
    value = {**good.to_json(), **change}
    value.pop("world") if not set(change) & set(good.to_json()) else None
    with pytest.raises(ValueError):
        Plan.from_json(value)
