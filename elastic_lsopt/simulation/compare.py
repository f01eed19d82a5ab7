"""The three modes under the same failures, for one number of replicas after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elastic_lsopt.simulation.consensus import consensus
from elastic_lsopt.simulation.elastic import elastic
from elastic_lsopt.simulation.outages import Outages, drawn
from elastic_lsopt.simulation.outcome import Outcome
from elastic_lsopt.simulation.scenario import Scenario
from elastic_lsopt.simulation.synchronous import synchronous

MODES = (synchronous, elastic, consensus)


def compare(scenario: Scenario, sizes: Sequence[int], trace: Outages | None = None) -> list[list[Outcome]]:
    """For each number of replicas each mode's outcome, in the order of MODES; without `trace` failures are drawn."""
    told = []
    for size in sizes:
        sized = replace(scenario, replicas=size)
        outages = drawn(sized) if trace is None else trace
        told.append([mode(sized, outages) for mode in MODES])
    return told
