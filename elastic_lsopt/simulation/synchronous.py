"""The synchronous mode: a fixed job that steps together, stops at each failure and restarts from its checkpoint.

    optimum between checkpoints    sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C, for C < 2M, else M

C: time of a checkpoint, M: mean time between failures of the whole job (J. Young, 1974; J. Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps", 2006, equation 37).
"""

from __future__ import annotations

import math

from elastic_lsopt.simulation.outages import Outages
from elastic_lsopt.simulation.outcome import Outcome, Spent, in_step
from elastic_lsopt.simulation.scenario import Scenario

MODE = "synchronous"


def between_checkpoints_s(scenario: Scenario, failures_per_s: float) -> float:
    """Seconds of steps from one checkpoint to the next: as given, else Daly's; without failures inf, and none."""
    if scenario.checkpoint_every_s:
        return scenario.checkpoint_every_s
    if not failures_per_s:
        return math.inf
    mean_s = 1 / failures_per_s
    part = scenario.checkpoint_s / (2 * mean_s)
    if part >= 1:
        return mean_s
    optimum = math.sqrt(2 * scenario.checkpoint_s * mean_s) * (1 + math.sqrt(part) / 3 + part / 9)
    step_s, _ = in_step(scenario, scenario.replicas)
    return max(optimum - scenario.checkpoint_s, step_s)


def synchronous(scenario: Scenario, outages: Outages) -> Outcome:
    """The job's outcome. It goes on when all are there again and it has restarted; failures meanwhile count too."""
    step_s, mean_s = in_step(scenario, scenario.replicas)
    end_s = scenario.horizon_s
    outages = outages.until(end_s)
    every_s = between_checkpoints_s(scenario, len(outages) / end_s if outages.traced else scenario.failures_per_s)
    cycle_s = every_s + scenario.checkpoint_s
    worked = redone = saving = stopped = 0.0
    now, back = 0.0, 0.0
    for _, down_s, up_s in [*outages, (0, end_s, end_s)]:
        if down_s >= back:  # it was at work from `back` on; else this failure falls into the stop
            saved, left_s = divmod(down_s - back, cycle_s)
            work_s = min(left_s, every_s)
            worked += saved * every_s if saved else 0.0
            saving += saved * scenario.checkpoint_s + left_s - work_s
            if down_s >= end_s:
                worked += work_s
            else:
                redone += work_s
            now = down_s
        if down_s < end_s:
            back_then, back = back, max(back, up_s + scenario.restart_s)
            stopped += min(back, end_s) - min(max(back_then, now), end_s)
    n = scenario.replicas
    steps, lost_steps = n * worked / step_s, n * redone / step_s
    exchange_s = scenario.exchange_s if n > 1 else 0.0
    spent = Spent(
        stopped=n * stopped, saving=n * saving, exchange=(steps + lost_steps) * exchange_s, lost=lost_steps * mean_s,
        useful=steps * mean_s,
    )  # fmt: skip
    return spent.outcome(MODE, scenario, end_s, steps=steps, lost_steps=lost_steps, failures=len(outages))
