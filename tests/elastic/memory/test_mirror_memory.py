"""The mirror keeps no more versions in host memory than `validate` says, however slow the network is."""

from __future__ import annotations

import threading
import zlib
from typing import Any

import pytest
import torch

from elastic_lsopt.elastic.memory.budget import MOST_LAGS, lags_within, versions_within
from elastic_lsopt.elastic.memory.versions import HostVersions, Version, lay_out


@pytest.mark.fast
def test_lags_follow_from_bytes() -> None:
    """Three versions at least, ten at most, and in between what the budget holds."""
    assert [versions_within(budget, 10) for budget in (0, 29, 30, 39, 40, 75, 99, 100, 10**9)] == [
        3, 3, 3, 3, 4, 7, 9, 10, 10,
    ]  # fmt: skip
    assert lags_within(10**9, 10) == MOST_LAGS and lags_within(0, 0) == 1


@pytest.mark.parametrize(("budget_versions", "most"), [(0.0, 3), (5.5, 5)])
def test_the_bytes_are_bounded_by_what_validate_prints(ranks: Any, budget_versions: float, most: int) -> None:
    for r in ranks(2).run("tests.cases.elastic.mirror_memory:slow_network", budget_versions=budget_versions):
        assert r["most"] <= r["said"], "more than validate promises"
        assert r["most"] > (most - 1) * r["one"], "the network was not slow enough to show anything"
        assert r["held"] == most


@pytest.mark.fast
def test_what_a_change_of_members_leaves_behind() -> None:
    """The moment from which all go on, and the oldest one: it may have more copies."""
    index = lay_out([(("w", 0, 4), "U8", 4)])
    versions = HostVersions()

    def version(generation: int, step: int) -> Version:
        return Version(generation, step, 0, 1, "n", index, torch.zeros(index.bytes, dtype=torch.uint8))

    versions._own = [version(1, s) for s in (3, 4, 5, 6)]
    versions.adopt([version(1, s) for s in (3, 4, 5)])
    versions.go_on_from(1, 5)
    assert [v.step for v in versions.held] == [3, 5, 3, 5]
    versions.go_on_from(1, 3)
    assert [v.step for v in versions.held] == [3, 3]


@pytest.mark.fast
def test_checksums_are_worked_out_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    real, threads = zlib.crc32, []

    def crc32(data: Any, value: int = 0) -> int:
        threads.append(threading.current_thread().name)
        return real(data, value)

    monkeypatch.setattr(zlib, "crc32", crc32)
    index = lay_out([(("w", 0, 4), "U8", 4)])
    versions = HostVersions()
    for step in (1, 2):
        versions._own.append(Version(1, step, 0, 1, "n", index, torch.full((index.bytes,), step, dtype=torch.uint8)))
    versions.sum_beside()
    assert [v.checksum() for v in versions.summed] == [real(bytes([s] * 4)) for s in (1, 2)]
    assert threads == ["checksums"] * 2
