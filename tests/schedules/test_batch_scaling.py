"""The rules against their papers' figures and closed forms, and as functions: how they compose, blend and end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from elastic_lsopt.schedules.adascale import Gain
from elastic_lsopt.schedules.batch_scaling import Hyperparameters, Scaling, blend, permits, scaling

pytestmark = pytest.mark.fast

SGD = Hyperparameters(global_batch_size=256, learning_rate=0.1, momentum=0.9, weight_decay=1e-4)
ADAMW = Hyperparameters(
    global_batch_size=32, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1, ema_decay=0.9999,
    rho=0.05, gamma=5e-4,
)  # fmt: skip


def scaled(own: Hyperparameters, batch: int, rule: Any, decoupled: bool = False, gain: Any = None) -> Hyperparameters:
    acts_on_weights = replace(own, decoupled_weight_decay=decoupled)
    large = scaling(own.global_batch_size, batch, rule, gain=gain).of(acts_on_weights, batch)
    return replace(large, decoupled_weight_decay=own.decoupled_weight_decay)


def test_linear_is_goyals_resnet_50_on_imagenet() -> None:
    """0.1 at 256 images is 3.2 at 8192; momentum 0.9 and weight decay 1e-4 stay."""
    large = scaled(SGD, 8192, "linear")
    assert large.learning_rate == pytest.approx(3.2)
    assert (large.momentum, large.weight_decay, large.global_batch_size) == (0.9, 1e-4, 8192)


def test_sqrt_is_malladis_rule_for_adam() -> None:
    """eta sqrt(k), 1 - beta -> k (1 - beta), eps / sqrt(k); here k = 4."""
    large = scaled(ADAMW, 128, "sqrt")
    assert large.learning_rate == pytest.approx(2e-3)
    assert large.betas == pytest.approx((0.6, 0.996))
    assert large.epsilon == pytest.approx(0.5e-8)


def test_one_step_of_the_scaled_average_is_k_steps_of_the_own() -> None:
    """Busbridge et al.: where the weights stand still, both averages are at the same place."""
    assert ADAMW.ema_decay is not None
    average, weights = 0.0, 1.0
    for _ in range(3):
        average = ADAMW.ema_decay * average + (1 - ADAMW.ema_decay) * weights
    decay = scaled(ADAMW, 96, "none").ema_decay
    assert decay is not None and 1 - decay == pytest.approx(average)


@pytest.mark.parametrize("rule", ["linear", "sqrt", "none"])
def test_adamws_decay_per_sample_stays_and_the_others_is_part_of_the_loss(rule: Any) -> None:
    large = scaled(ADAMW, 96, rule, decoupled=True)
    per_sample = [h.learning_rate * h.weight_decay / h.global_batch_size for h in (ADAMW, large)]
    assert per_sample[1] == pytest.approx(per_sample[0])
    assert scaled(ADAMW, 96, rule).weight_decay == ADAMW.weight_decay


def test_the_radius_and_the_filter_are_lengths_and_stay() -> None:
    large = scaled(ADAMW, 128, "sqrt")
    assert (large.rho, large.gamma) == (0.05, 5e-4)


@pytest.mark.parametrize(("gain", "factor"), [(Gain(9.0, 1.0), None), (Gain(0.0, 1.0), 1.0), (Gain(9.0, 0.0), 4.0)])
def test_adascale_takes_the_measured_gain(gain: Gain, factor: float | None) -> None:
    """No noise: nothing gained; only noise: all of k. Else Johnson et al., equation 4, written out."""
    var, sqr, k = gain.variance / 256, gain.square, 4
    expected = factor or (var + sqr) / (var / k + sqr)
    large = scaled(SGD, 1024, "adascale", gain=gain)
    assert large.learning_rate == pytest.approx(0.1 * expected)
    assert scaled(SGD, 1024, "adascale").learning_rate == 0.1


def test_sqrt_ends_where_a_beta_would_be_negative() -> None:
    """k (1 - 0.9) < 1: up to nine times the batch, not ten; without Adam's first moment the second one decides."""
    assert permits(ADAMW, 9 * 32, "sqrt") and not permits(ADAMW, 320, "sqrt") and permits(ADAMW, 320, "linear")
    rms = Hyperparameters(global_batch_size=32, learning_rate=1.0, betas=(0.0, 0.99))
    assert permits(rms, 99 * 32, "sqrt") and not permits(rms, 3200, "sqrt")
    assert scaled(rms, 64, "sqrt").betas == pytest.approx((0.0, 0.98))


batches = st.integers(1, 4096)


@given(first=batches, second=batches, third=batches, rule=st.sampled_from(["linear", "sqrt"]), decoupled=st.booleans())
def test_two_changes_are_one(first: int, second: int, third: int, rule: Any, decoupled: bool) -> None:
    own = Hyperparameters(
        global_batch_size=first, learning_rate=0.3, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1, ema_decay=0.99
    )
    assume(permits(own, second, rule) and permits(own, third, rule))
    there = scaled(scaled(own, second, rule, decoupled), third, rule, decoupled)
    at_once = scaled(own, third, rule, decoupled)
    assert there.learning_rate == pytest.approx(at_once.learning_rate)
    assert there.betas == pytest.approx(at_once.betas)
    assert there.epsilon == pytest.approx(at_once.epsilon)
    assert there.weight_decay == pytest.approx(at_once.weight_decay)
    assert there.ema_decay == pytest.approx(at_once.ema_decay)


@pytest.mark.long
@given(batch=batches, rule=st.sampled_from(["linear", "sqrt", "adascale", "none"]))
def test_the_own_batch_changes_no_bit(batch: int, rule: Any) -> None:
    own = Hyperparameters(
        global_batch_size=batch, learning_rate=0.1, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.3, ema_decay=0.999
    )
    assert scaled(own, batch, rule, decoupled=True, gain=Gain(3.0, 1.0)) == own


factors = st.floats(1e-3, 1e3)


@given(old=factors, new=factors, shares=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted))
def test_a_blend_goes_from_one_to_the_other_and_never_beyond(old: float, new: float, shares: list[float]) -> None:
    ends = Scaling(rate=old, ema=old), Scaling(rate=new, ema=new)
    assert blend(*ends, 0.0) == ends[0] and blend(*ends, 1.0) == ends[1]
    early, late = (blend(*ends, share) for share in shares)
    assert min(old, new) <= early.rate <= max(old, new)
    assert (late.rate - early.rate) * (new - old) >= 0
    assert blend(*ends, 0.5).rate == pytest.approx((old + new) / 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    ],
)
def test_a_param_group_is_read_and_written(make: Any) -> None:
    group = make([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    own = Hyperparameters.of_group(group, 32)
    before = dict(group)
    own.into_group(group)
    assert group == before
    large = scaled(own, 128, "sqrt", decoupled="betas" in group)
    large.into_group(group, schedule=0.25)
    assert group["lr"] == pytest.approx(own.learning_rate * math.sqrt(4) * 0.25)
    assert Hyperparameters.of_group(group, 128) == Hyperparameters.of_group(
        {**group, "betas": large.betas} if "betas" in group else group, 128
    )
    if "betas" in group:
        assert group["betas"] == pytest.approx((0.6, 0.996)) and group["eps"] == pytest.approx(0.5e-8)
        assert group["weight_decay"] == pytest.approx(0.2)
    else:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
