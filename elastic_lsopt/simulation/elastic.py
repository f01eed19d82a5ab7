"""The elastic mode: one job that steps together, forms anew without what it has lost, and takes in what comes back.

Each loss costs all a pause and the step in flight; then the rest goes on at once. A newcomer starts while the others
train, and costs them another pause. Changes that fall into a pause lengthen it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from elastic_lsopt.simulation.outages import Outages
from elastic_lsopt.simulation.outcome import Outcome, Spent, in_step
from elastic_lsopt.simulation.scenario import Scenario

MODE = "elastic"


def elastic(scenario: Scenario, outages: Outages) -> Outcome:
    """The job's outcome. Of a replica that is no whole one GPU leaves, and the rest of it works on."""
    end_s, n = scenario.horizon_s, scenario.replicas
    outages = outages.until(end_s).back(scenario.restart_s)
    part = 1.0 if outages.whole else 1.0 / scenario.gpus
    exchange_s = scenario.exchange_s if n > 1 else 0.0
    steps_of = lru_cache(maxsize=4096)(lambda present: in_step(scenario, present))
    times = np.concatenate([outages.down_s, outages.up_s, [end_s]])
    gains = np.concatenate([np.full(len(outages), -part), np.full(len(outages), part), [0.0]])
    order = np.argsort(times, kind="stable")
    spent, steps, lost_steps = Spent(), 0.0, 0.0
    present, now, resumed = float(n), 0.0, 0.0
    for at_s, gain in zip(np.minimum(times[order], end_s).tolist(), gains[order].tolist(), strict=True):
        spent.stopped += present * (min(resumed, at_s) - min(now, resumed, at_s))
        spent.away += (n - present) * (at_s - now)
        if at_s > resumed and round(present):
            step_s, mean_s = steps_of(round(present, 6))
            taken = (at_s - resumed) / step_s
            gone = taken % 1.0 if gain < 0 else 0.0
            taken -= gone
            steps, lost_steps = steps + present * taken, lost_steps + present * gone
            spent.useful += present * taken * mean_s
            spent.lost += present * gone * mean_s
            spent.exchange += present * (taken + gone) * exchange_s
        if gain and at_s < end_s:
            present = min(float(n), max(0.0, present + gain))
            resumed = max(resumed, at_s + (scenario.reform_s if gain < 0 else scenario.join_s))
        now = at_s
        if at_s >= end_s:
            break
    return spent.outcome(MODE, scenario, end_s, steps=steps, lost_steps=lost_steps, failures=len(outages))
