"""How many versions of the state a job may keep in host memory: trail.py, [Note: the bound]."""

from __future__ import annotations

MOST_LAGS = 8


def lags_within(budget_bytes: float, version_bytes: int) -> int:
    """How many versions the committed one may trail, 1 to MOST_LAGS; `version_bytes`: of a version and its mirrored
    peers'."""
    return max(1, min(MOST_LAGS, int(budget_bytes // max(1, version_bytes)) - 2))


def versions_within(budget_bytes: float, version_bytes: int) -> int:
    """How many versions exist at a time, at most."""
    return lags_within(budget_bytes, version_bytes) + 2
