"""The benchmark of an agent's records runs at toy size."""

from __future__ import annotations

from benchmarks.elastic import agent as elastic_agent


def test_records_are_counted() -> None:
    figures = elastic_agent.measure(agents=4, count=60)
    assert figures["main_us_per_record"] > 0 and figures["process_us_per_record"] > 0
