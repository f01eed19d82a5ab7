"""Trajectories and surfaces give the same numbers at any world size."""

from __future__ import annotations

from typing import Any

import pytest


def test_the_same_numbers_at_any_world_size(ranks: Any) -> None:
    """Motion, components with their signs, filters, surfaces, projections and paths; and the weights are back."""
    out = [ranks(world).run("tests.cases.probes.trajectories:numbers", kind="fsdp2") for world in (1, 2, 3)]
    reference = out[0][0]
    for r in (r for world in out for r in world):
        assert r["back"]
        for what in ("motion", "ratios", "pca", "filters", "surface", "projection", "paths"):
            assert len(r[what]) == len(reference[what]) > 0
            assert r[what] == pytest.approx(reference[what], rel=1e-9, abs=1e-11), what


@pytest.mark.parametrize(
    "kind,near",
    [
        ("hsdp", 1e-9),
        ("zero3", 1e-3),
        pytest.param("ddp", 1e-9, marks=pytest.mark.full),
        *(pytest.param(kind, 1e-3, marks=pytest.mark.full) for kind in ("zero1", "zero2")),
    ],
)
def test_the_same_numbers_on_any_backend(ranks: Any, kind: str, near: float) -> None:
    """ZeRO computes in fp32, and its masters stay where they are while the working weights are away."""
    reference = ranks(2).run("tests.cases.probes.trajectories:numbers", kind="fsdp2")[0]
    for r in ranks(2).run("tests.cases.probes.trajectories:numbers", kind=kind):
        assert r.pop("back")
        for what, values in r.items():
            assert values == pytest.approx(reference[what], rel=near, abs=near / 100), what
