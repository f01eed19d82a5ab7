"""What a mode made of the job's time."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_lsopt.simulation.scenario import Scenario
from elastic_lsopt.simulation.step_times import Sums, mean_of_last, sums


@dataclass(frozen=True)
class Outcome:
    """Goodput is work that counts over what all replicas could do, undisturbed and waiting for nobody, in the time.

    `losses` are the shares of the rest, by what they went to; with goodput they sum to 1. Where nobody failed and all
    are equally fast it is 1 less the exchanges' share. Steps are those of single replicas.
    """

    mode: str
    replicas: int
    goodput: float
    seconds: float
    steps: float
    """That count."""
    lost_steps: float
    """That were taken, and count for nothing or are taken again."""
    failures: int
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class Spent:
    """Seconds of single replicas by what they went to; waiting is what is left."""

    away: float = 0.0
    stopped: float = 0.0
    saving: float = 0.0
    exchange: float = 0.0
    lost: float = 0.0
    useful: float = 0.0

    def outcome(
        self, mode: str, scenario: Scenario, seconds: float, *, steps: float, lost_steps: float, failures: int
    ) -> Outcome:
        every = scenario.replicas * seconds
        shares = {name: value / every for name, value in vars(self).items()}
        goodput = shares.pop("useful")
        shares["waiting"] = 1.0 - goodput - sum(shares.values())
        return Outcome(mode, scenario.replicas, goodput, seconds, steps, lost_steps, failures, shares)


def in_step(scenario: Scenario, present: float) -> tuple[float, float]:
    """Of replicas that step together: a step of so many of them, with its exchange; the mean of their own times."""
    ordinary = sums(scenario.step_times, scenario.step_s, scenario.spread, 1)
    slow = scenario.slow * present / scenario.replicas
    groups: list[tuple[Sums, int]] = [
        (ordinary, round(present - slow)), (ordinary.scaled(scenario.slow_factor), round(slow)),
    ]  # fmt: skip
    exchange_s = scenario.exchange_s if scenario.replicas > 1 else 0.0
    mean_s = scenario.step_s * (1 + (scenario.slow_factor - 1) * scenario.slow / scenario.replicas)
    return mean_of_last(groups) + exchange_s, mean_s
