"""What is simulated: how many replicas of what speed, what fails how often, and what each thing costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from elastic_lsopt.errors import UserError

YEAR_H = 8766.0
"""Of 365.25 days. One failure per chip and year is what Decoupled DiLoCo assumes (arXiv 2604.21428, Table 1)."""
MOST = 10**6
"""Replicas."""
MOST_GPUS = 2 * 10**7


def setting(default: Any, unit: str, said: str, least: float = 0.0, most: float = math.inf) -> Any:
    """A field with its range; a range that begins above zero at `least` = 0 is said by `unit` ending in "!"."""
    return field(
        default=default,
        metadata={
            "unit": unit.rstrip("!"), "said": said, "least": least, "most": most, "positive": unit.endswith("!"),
        },
    )  # fmt: skip


def choice(said: str, *choices: str) -> Any:
    """A field with one of these values, the first by default."""
    return field(default=choices[0], metadata={"unit": "|".join(choices), "said": said})


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One job. Times are in seconds unless a name says otherwise. Raises UserError for a value out of range."""

    replicas: int = setting(8, "N!", "groups of ranks that train one copy of the model each", 1, MOST)
    gpus: int = setting(1, "N!", "GPUs of a replica", 1, MOST_GPUS)
    step_s: float = setting(1.0, "S!", "mean time of a replica's step")
    spread: float = setting(0.02, "SHARE", "standard deviation of a step's time over its mean", 0, 0.25)
    step_times: str = choice("how step times are distributed; exponential has no --spread", "normal", "exponential")
    slow_share: float = setting(0.0, "SHARE", "share of the replicas that are slow for good", 0, 1)
    slow_factor: float = setting(1.0, "FACTOR!", "a slow replica's step over another's", 1, 1000)
    steps: str = choice("whether a slow replica takes fewer steps to an exchange", "by_size", "by_speed")
    exchange_s: float = setting(0.1, "S", "an exchange that no compute hides, of all parameters between replicas")
    tau: int = setting(32, "N!", "steps between exchanges in the consensus mode", 1, 10**4)
    timeout_s: float = setting(30.0, "S!", "deadline of an exchange, half of it for others to come")
    notice_s: float = setting(math.inf, "S", "until the others know that a replica is gone; inf: by the deadline")
    mtbf_h: float = setting(YEAR_H, "HOURS!", "mean time between failures of one GPU; inf: none fails")
    replace_s: float = setting(0.0, "S", "until a lost GPU has another in its place; 0: a spare stands by")
    restart_s: float = setting(600.0, "S", "from there to its first step: processes, data, state")
    reform_s: float = setting(4.0, "S", "pause of an elastic job that has lost a rank")
    join_s: float = setting(0.7, "S", "pause of an elastic job that takes one in")
    checkpoint_s: float = setting(10.0, "S", "pause for a checkpoint, in the synchronous mode")
    checkpoint_every_s: float = setting(0.0, "S", "between checkpoints; 0: Daly's optimum")
    heals: bool = field(
        default=False, metadata={"said": "a replica that loses a GPU goes on with the rest, as an elastic job does"}
    )
    days: float = setting(30.0, "DAYS!", "how long the job is watched", 0, 10**5)
    seed: int = setting(0, "N", "of the failures and step times", 0, 2**31)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(name, value, f"{name}={value!r}")
        check_together(self)

    @property
    def horizon_s(self) -> float:
        return self.days * 86400.0

    @property
    def failures_per_s(self) -> float:
        """Of the whole job, while all of it is there."""
        return self.replicas * self.gpus / (self.mtbf_h * 3600.0)

    @property
    def slow(self) -> int:
        """How many replicas are slow: the last ones."""
        return round(self.slow_share * self.replicas)


SETTINGS = {f.name: f for f in fields(Scenario)}


def check(name: str, value: Any, said: str) -> None:
    """One line, beginning with `said`, for a value out of its setting's range."""
    told, kind = SETTINGS[name].metadata, SETTINGS[name].type
    if kind == "bool":
        return
    if kind == "str":
        if value not in (choices := told["unit"].split("|")):
            raise UserError(f"{said} must be {' or '.join(choices)}.")
        return
    whole = kind == "int"
    right = isinstance(value, int) if whole else isinstance(value, int | float)
    right = right and told["least"] <= value <= told["most"] and not (told["positive"] and value == 0)
    if not whole and math.isinf(value):
        right = right and name in ("notice_s", "mtbf_h")
    if not right:
        least = "> 0" if told["positive"] and told["least"] == 0 else f">= {told['least']:g}"
        most = "" if math.isinf(told["most"]) else f" and <= {told['most']:,.12g}"
        raise UserError(f"{said} must be a {'whole ' if whole else ''}number {least}{most}.")


def check_together(scenario: Scenario) -> None:
    """Settings that are right alone and wrong together."""
    if scenario.step_times == "exponential" and scenario.spread not in (SETTINGS["spread"].default, 0.0):
        raise UserError(
            f"spread {scenario.spread:g} stands beside step_times exponential, which has its own: leave spread out."
        )
    if scenario.replicas * scenario.gpus > MOST_GPUS:
        raise UserError(
            f"replicas {scenario.replicas} times gpus {scenario.gpus} must be at most {MOST_GPUS:,} together."
        )
    if scenario.heals and scenario.gpus == 1:
        raise UserError("heals needs gpus >= 2: of a replica of one GPU nothing goes on.")
