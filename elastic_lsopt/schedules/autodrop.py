"""AutoDrop: the rate falls when the weights have begun to only turn about, seen by the angle of successive moves.

    x_i    the weights at the end of window i                 s_i = x_i - x_{i-1}
    omega_i = angle(s_i, s_{i-1}) in degrees                  the angular velocity
    once |omega_i - omega_{i-1}| < theta: wait until `extra_windows` windows are over, that one counted; then
    eta <- max(lower_lr, rho eta),  theta <- min(upper_theta, theta / rho)

Teng, Wang, Choromanska: "AutoDrop: Training Deep Learning Models with Automatic Learning Rate Drop", 2021, arXiv
2111.15317; the authors' code (yunfei-teng/AutoDrop, codes/models.py). Rest point: a theta that no turn's change is
below, where the rate is constant.

Paper and code differ: the paper drops where the angular velocity saturates, the code waits 20 epochs first; this is the
code's rule, the paper's with extra_windows = 1. Differs from the code in: 1. a window is a number of committed samples
(the code's: an epoch), so a run of one epoch can have many, and its end is after the step that ends it (the code's:
after the first step of the next); 2. the code's option var_rd, which also puts the weights to the triangular mean of
what the wait has passed, is left out: SWA and LAWA keep such a mean beside the weights; 3. the code adds 1e-8 to the
product of the lengths, which would tilt the angles of the small moves of a fine-tuning; here a move of no length at
all counts as 90 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.oracle.family import Family, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace

AUTODROP = "autodrop"
FACTOR = "factor"
NOT_YET = -1.0
"""A length or an angle of which there is none yet."""


@dataclass(frozen=True, kw_only=True)
class AutoDrop(Stateful):
    """A state family that looks at the weights and holds the factor on the rate: `dropped(families)`.

    Cost: at the end of a window three passes over the weights. Memory: two Vectors, 1/N per rank. Communication: two
    all-reduces of a number per window. Raises UserError for a value out of range.
    """

    window_samples: int
    """Committed samples in a window; the paper's: an epoch."""
    theta: float = 0.01
    """Degrees; > 0. The authors' scripts: 0.01."""
    upper_theta: float = 1.0
    """Degrees; >= theta. The authors' scripts: 1."""
    rho: float = 0.2
    """Factor of a drop, in (0, 1). The authors' scripts: 0.2 on CIFAR, 0.1 on ImageNet."""
    lowest: float = 0.0
    """Least factor on the rate; >= 0. The authors' scripts: 1e-4 over the initial rate of 0.05 or 0.1."""
    extra_windows: int = 20
    """Windows from the one that has saturated, it counted, to the drop; >= 1. The authors' scripts: 20."""
    name: str = AUTODROP
    same_on_all_replicas: bool = False

    def __post_init__(self) -> None:
        require_count("window_samples", self.window_samples)
        require(self.theta > 0, "theta", self.theta, "a number > 0")
        require(self.upper_theta >= self.theta, "upper_theta", self.upper_theta, f"at least theta={self.theta:g}")
        require(0 < self.rho < 1, "rho", self.rho, "a number > 0 and < 1")
        require(0 <= self.lowest <= 1, "lowest", self.lowest, "a number >= 0 and <= 1")
        require_count("extra_windows", self.extra_windows)

    def init(self, space: ParameterSpace) -> State:
        return {
            "at": space.weights.clone(), "move": space.zeros(), "length": NOT_YET, "omega": NOT_YET,
            "window": 0, "waited": 0, "theta": self.theta, FACTOR: 1.0,
        }  # fmt: skip

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        window = report.clock.window(self.window_samples)
        if window <= state["window"]:
            return
        state["window"] = window
        move = state["at"].mul_(-1.0).add_(space.weights)  # s_i, in the place of x_{i-1}
        length = space.norm(move)
        if state["length"] != NOT_YET:
            lengths = length * state["length"]
            cosine = space.dot(move, state["move"]) / lengths if lengths else 0.0
            self.turned(math.degrees(math.acos(min(max(cosine, -1.0), 1.0))), state)
        state["move"].copy_(move)
        state["length"] = length
        state["at"].copy_(space.weights)

    def turned(self, omega: float, state: dict[str, Any]) -> None:
        """The rule, at the end of a window in which the weights have turned by `omega` degrees."""
        saturated = state["omega"] != NOT_YET and abs(omega - state["omega"]) < state["theta"]
        state["omega"] = omega
        if not saturated and not state["waited"]:
            return
        state["waited"] += 1
        if state["waited"] == self.extra_windows:
            state["waited"] = 0
            state["theta"] = min(self.upper_theta, state["theta"] / self.rho)
            state[FACTOR] = max(self.lowest, self.rho * state[FACTOR])


def dropped(families: Mapping[str, Family]) -> float:
    """The factor on the rate that an engine's families hold; 1 where nothing looks."""
    state: dict[str, Any] = dict(families[AUTODROP].state_dict()) if AUTODROP in families else {}
    return float(state.get(FACTOR, 1.0))
