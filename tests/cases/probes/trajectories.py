"""Trajectories and surfaces on real ranks: the numbers of a small run, to be the same at every world size."""

from __future__ import annotations

from typing import Any

import torch

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.filter_normalisation import filter_normalised
from elastic_lsopt.probes.surface.mode_connectivity import mode_connectivity
from elastic_lsopt.probes.surface.surface import project, surface
from elastic_lsopt.probes.trajectory.trajectory import Trajectory
from elastic_lsopt.probes.trajectory.trajectory_pca import trajectory_pca
from elastic_lsopt.space.basis import Basis
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy


def numbers(kind: str) -> dict[str, Any]:
    """All measures of six steps of momentum, as flat lists of numbers; `back` tells whether the weights came back."""
    dtype = torch.float32 if kind.startswith("zero") else torch.float64
    engine = engines.build(kind, engines.net(dtype=dtype), lso.Plain())
    steps = engines.batches(6, 5, last=2, dtype=dtype)
    space = engine.space
    eigenvectors = Basis(space, 2)
    for draw in (7, 8):
        eigenvectors.append(space.noise(0, draw).vector())
    trajectory = Trajectory(space, window=5)
    start = space.weights.clone()
    out: dict[str, Any] = {"motion": [], "ratios": []}
    for i, units in enumerate(steps):
        engine.train_batch(engines.mine(units))
        seen = trajectory.observe(engine.clock, gradient=space.noise(i).vector(), eigenvectors=eigenvectors)
        assert seen.update_alignment and seen.gradient_alignment
        if i:
            out["motion"] += [seen.cosine, seen.angle, seen.angular_velocity * 18]
        out["motion"] += [seen.path_length, seen.distance_from_start, seen.distance_from_mark]
        out["motion"] += [*seen.update_alignment.cosines, seen.gradient_alignment.share]
        out["ratios"] += seen.update_to_weight.values()
        if i == 2:
            trajectory.mark()
    assert trajectory.window
    parts = trajectory_pca(trajectory.window)
    out["pca"] = [*parts.explained, *(x for row in parts.coordinates for x in row)]
    space, oracle = lso.attach(engine, cross_entropy, engines.mine(steps[0]))
    end = space.weights.clone()
    out["filters"] = space.norm_per_row(filter_normalised(space, space.noise(3).vector())).values.tolist()
    plane = surface(space, oracle, along=parts.directions, alphas=(-0.3, 0.1), betas=(0.0, 0.2, 0.4))
    line = surface(space, oracle, dimensions=1, alphas=(-1.0, 0.5))
    out["surface"] = [x for row in (*plane.losses, *line.losses) for x in row]
    found = project(space, [start, end], parts.directions)
    out["projection"] = [*found.coordinates[0], found.distances[0]]
    away = (start - end).mul_(20).add_(end)
    line = mode_connectivity(space, oracle, start=away, end=end, points=5)
    bezier = mode_connectivity(space, oracle, start=away, end=end, curve="bezier", points=5, steps=6)
    assert bezier.bend
    out["paths"] = [*line.losses, line.barrier, *bezier.losses, *bezier.training, space.norm(bezier.bend)]
    out["back"] = all(torch.equal(a, b) for a, b in zip(end.tensors, space.weights.tensors, strict=True))
    engines.close(engine)
    return out
