"""AutoDrop: angles by closed forms, the rule by the authors' loop over all positions, both on any sharding."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.family import Kept
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.schedules.autodrop import AutoDrop, dropped
from elastic_lsopt.space.geometry import ParameterSpace
from tests.laws.cover import full_but

ZERO = [(f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)]


def followed(points: list[torch.Tensor], rule: AutoDrop) -> tuple[list[float], list[tuple[float, float]]]:
    """The angles, and (factor, theta), after each of these points, one per window; the first is the beginning."""
    weights = nn.Parameter(points[0].clone())
    space = ParameterSpace(Replicated(nn.ParameterList([weights]).named_parameters(), None, model=None))
    family, clock = Kept(rule, space), SampleClock()
    angles, states = [], []
    for point in points[1:]:
        with torch.no_grad():
            weights.copy_(point)
        clock = clock.advanced(rule.window_samples)
        rule.after_step(space, StepReport(0.0, 1, 0.0, rule.window_samples, False, clock=clock), family.state)
        angles.append(family.state["omega"])
        states.append((dropped({"autodrop": family}), family.state["theta"]))
    return angles, states


def authors(positions: list[torch.Tensor], rho: float, theta: float, upper: float, lower: float, extra: int) -> Any:
    """(rate over its peak, theta) after each position, as the authors' loop has it: it keeps the last three positions,
    counts from the first saturated turn on, and only then looks at the counter."""
    lr, enabled, counter, last_three, velocities, out = 1.0, False, 0, [positions[0]], [], []
    for position in positions[1:]:
        last_three = [*last_three, position][-3:]
        if len(last_three) > 2:
            p1, p2 = last_three[-1] - last_three[-2], last_three[-2] - last_three[-3]
            cosine = float(torch.sum(p1 * p2) / (p1.norm() * p2.norm() + 1e-8))
            velocities.append(math.degrees(math.acos(cosine)))
            if len(velocities) >= 2:
                difference = velocities[-1] - velocities[-2]
                enabled = enabled or -theta < difference < theta
                if enabled:
                    counter += 1
                    if counter == extra:
                        theta = min(upper, theta / rho)
                        lr = max(lower, lr * rho)
                        enabled, counter = False, 0
        out.append((lr, theta))
    return out


def spiral(turns: list[float]) -> list[torch.Tensor]:
    """Points of the plane whose successive moves turn by these degrees."""
    at, heading, out = torch.zeros(2, dtype=torch.float64), 0.0, [torch.zeros(2, dtype=torch.float64)]
    for turn in [0.0, *turns]:
        heading += math.radians(turn)
        at = at + torch.tensor([math.cos(heading), math.sin(heading)], dtype=torch.float64)
        out.append(at)
    return out


@pytest.mark.fast
def test_the_angles_of_a_known_path() -> None:
    turns = [10.0, 90.0, 135.0, 3.0]
    angles, _ = followed(spiral(turns), AutoDrop(window_samples=5))
    assert angles[0] == -1.0 and angles[1:] == pytest.approx(turns, abs=1e-9)


@pytest.mark.fast
@pytest.mark.parametrize(("phi", "cosine"), [(1.0, 0.0), (0.9, -0.05), (0.5, -0.25), (0.0, -0.5)])
def test_the_angle_of_an_autoregressive_path(phi: float, cosine: float) -> None:
    """Increments of a stationary AR(1) have the correlation -(1 - phi) / 2: a random walk 90, points about a centre 120
    degrees. 200,000 coordinates: the cosine spreads by 0.0022, four times that is allowed."""
    draw = torch.Generator().manual_seed(0)
    scale = math.sqrt(1 - phi**2) if phi < 1 else 1.0
    x = [torch.randn(200_000, generator=draw, dtype=torch.float64)]
    for _ in range(3):
        x.append(phi * x[-1] + scale * torch.randn(200_000, generator=draw, dtype=torch.float64))
    angles, _ = followed(x, AutoDrop(window_samples=1))
    assert [math.cos(math.radians(a)) for a in angles[1:]] == pytest.approx([cosine] * 2, abs=0.009)


@pytest.mark.fast
@pytest.mark.parametrize("extra", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rule_is_the_authors(seed: int, extra: int) -> None:
    draw = random.Random(seed)
    turns = [90 + draw.gauss(0, 2) for _ in range(80)]
    rule = AutoDrop(window_samples=7, rho=0.3, theta=0.2, upper_theta=1.5, lowest=0.02, extra_windows=extra)
    _, found = followed(spiral(turns), rule)
    wanted = authors(spiral(turns), 0.3, 0.2, 1.5, 0.02, extra)
    assert found == wanted and len({rate for rate, _ in wanted}) > 2


@pytest.mark.fast
def test_moments_follow_from_committed_samples() -> None:
    """Law 6: batches of 10, 20 and 40 look at the same points, and a step over two windows ends one."""
    path = spiral([5.0 * i for i in range(12)])
    seen = []
    for batch in (10, 20, 40):
        weights = nn.Parameter(path[0].clone())
        space = ParameterSpace(Replicated(nn.ParameterList([weights]).named_parameters(), None, model=None))
        rule, clock = AutoDrop(window_samples=40), SampleClock()
        state: Any = rule.init(space)
        while clock.samples < 480:
            clock = clock.advanced(batch)
            with torch.no_grad():
                weights.copy_(path[clock.samples // 40])
            rule.after_step(space, StepReport(0.0, 1, 0.0, batch, False, clock=clock), state)
        seen.append((state["omega"], state["window"], state["factor"]))
    assert len({*seen}) == 1 and seen[0][1] == 12


@pytest.mark.fast
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window_samples": 0}, "window_samples=0"), ({"theta": 0.0}, "theta=0.0 must be a number > 0"),
        ({"theta": 2.0}, "upper_theta=1.0 must be at least theta=2"), ({"rho": 1.0}, "rho=1.0 must be"),
        ({"lowest": -1.0}, "lowest=-1.0 must be"), ({"extra_windows": 0}, "extra_windows=0 must be"),
    ],
)  # fmt: skip
def test_out_of_range(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(lso.UserError, match=said):
        AutoDrop(**{"window_samples": 10, **wrong})


@pytest.mark.parametrize(
    "kind,world", full_but([("fsdp2", 3), ("zero1", 2)], [("plain", 1), ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), *ZERO])
)
def test_any_sharding_sees_the_same_angles(ranks: Any, kind: str, world: int) -> None:
    zero = kind.startswith("zero")
    for r in ranks(world).run("tests.cases.autodrop:turned", kind=kind, dtype="fp32" if zero else "fp64"):
        assert r["off"] < (0.02 if zero else 1e-6) and r["turns"] > 1.0 and r["vectors"] == 2.0, r
