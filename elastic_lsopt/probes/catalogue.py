"""Measures by name: what a YAML's `probes:`, `elastic-lsopt probe --measures` and the Trainer's callback can ask for.

    lambda_max: {}                        a measure with its probe's own settings
    top_eigenvalues: {k: 3, of: ggn}      settings are the probe's keyword arguments

A name means the same number wherever it is asked for: in a job, of a finished model, in a study. What a measure needs
beside space and oracle (the learning rate, the weights that the training began with) it takes from the `ProbeContext`
that it is measured in, and where that is not known it is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from statistics import fmean, stdev
from typing import Any, Unpack

import torch
from torch import Tensor

from elastic_lsopt.by_name import imported
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.probes.flatness.effective_dimension import effective_dimension
from elastic_lsopt.probes.flatness.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.flatness.filter_norms import normalised
from elastic_lsopt.probes.flatness.fisher_rao import fisher_rao
from elastic_lsopt.probes.flatness.gradient_norm import gradient_norm
from elastic_lsopt.probes.flatness.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.flatness.logit_share import logit_share
from elastic_lsopt.probes.flatness.lpf import lpf
from elastic_lsopt.probes.flatness.mean_valley import mean_valley
from elastic_lsopt.probes.flatness.pac_bayes import pac_bayes
from elastic_lsopt.probes.flatness.sam_sharpness import sam_sharpness
from elastic_lsopt.probes.flatness.shannon_entropy import shannon_entropy
from elastic_lsopt.probes.noise.noise_scale import noise_scale
from elastic_lsopt.probes.presets import PRESETS
from elastic_lsopt.probes.spectrum.frobenius import frobenius
from elastic_lsopt.probes.spectrum.hutchinson import hutchinson
from elastic_lsopt.probes.spectrum.hutchpp import hutchpp
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.lobpcg import lobpcg
from elastic_lsopt.probes.spectrum.operator import Matrix, On, Operator, operator
from elastic_lsopt.probes.spectrum.power_iteration import power_iteration
from elastic_lsopt.probes.spectrum.spectral_density import spectral_density
from elastic_lsopt.probes.spectrum.xtrace import xtrace
from elastic_lsopt.probes.surface.mode_connectivity import Curve, mode_connectivity
from elastic_lsopt.probes.surface.surface import project, surface
from elastic_lsopt.probes.trajectory.edge_of_stability import adam_edge_of_stability, edge_of_stability
from elastic_lsopt.probes.trajectory.trajectory_pca import Window, trajectory_pca
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """Where a measure is taken: the loss on fixed batches, and what is known of the training around it."""

    space: ParameterSpace
    oracle: MicroBatchOracle
    batches: Callable[[], Sequence[MicroBatchOracle]]
    """An oracle a batch, for the noise between them."""
    samples: int
    """Of the training set."""
    learning_rate: float | None = None
    """Of the next step; None: there is no training."""
    momentum: float = 0.0
    adam: tuple[tuple[float, float], float, int] | None = None
    """Its betas, its epsilon, its steps so far; None: the base is SGD."""
    initial: Vector | None = None
    """The weights that the training began with; None: nobody knows them."""
    branches: Callable[[], Sequence[Vector]] | None = None
    """Other ends of the same training."""
    window: Window | None = None
    """The points of the run so far, as differences from its start."""
    other: Vector | None = None
    """The weights of another model of the same shape."""


@dataclass(frozen=True)
class Measure:
    """A probe by name: `ask(situation, **settings)`; `settings` are its keywords and their defaults."""

    ask: Callable[..., Any]
    settings: Mapping[str, Any]
    required: tuple[str, ...] = ()
    """Settings without a default, of a user's own probe."""
    needs: str | None = None
    """What of the situation must be known for it."""


NEEDS = {
    "learning_rate": "a learning rate, and a finished model has none; measure lambda_max",
    "other": "another model of the same shape: elastic-lsopt probe MODEL --measures mode_connectivity --other ANOTHER",
    "initial": "the weights that the training began with, and they are not known here",
    "branches": "several ends of one training, which only a study has",
}
"""What a measure may need, and what to say where it is not there."""


def _needing(needs: str, found: Measure) -> Measure:
    def ask(s: ProbeContext, **own: Any) -> Any:
        if getattr(s, needs) is None:
            raise UserError(f"it needs {NEEDS[needs]}.")
        return found.ask(s, **own)

    return replace(found, ask=ask, needs=needs)


def _probe(
    function: Callable[..., Any], given: Callable[[ProbeContext], dict[str, Any]] = lambda s: {}, **other: Any
) -> Measure:
    """A probe's keywords of plain type; `given` by the situation, `other` defaults than the probe's own."""
    takes = dict(inspect.signature(function).parameters)
    if any(p.annotation in ("Unpack[On]", Unpack[On]) for p in takes.values()):
        takes |= inspect.signature(operator).parameters
    settings = {
        name: other.get(name, p.default)
        for name, p in takes.items()
        if p.kind is p.KEYWORD_ONLY and (name in other or isinstance(p.default, bool | int | float | str | None))
    }

    def ask(s: ProbeContext, **own: Any) -> Any:
        settings = {**other, **given(s), **own}
        if settings.get("of") == "normalised":  # the Hessian in coordinates in which every filter has length 1
            settings["of"] = normalised(s.space, s.oracle, parameters=settings.get("parameters"))
        return function(s.space, s.oracle, **settings)

    return Measure(ask, settings)


def _asking(function: Callable[..., Any]) -> Measure:
    """A function of the situation itself."""
    parameters = inspect.signature(function).parameters.values()
    return Measure(function, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})


def _edge(s: ProbeContext, *, of: Matrix = "hessian") -> Any:
    assert s.learning_rate is not None
    if s.adam is None:
        return edge_of_stability(s.space, s.oracle, learning_rate=s.learning_rate, momentum=s.momentum, of=of)
    betas, eps, steps = s.adam
    return adam_edge_of_stability(
        s.space, s.oracle, learning_rate=s.learning_rate, steps=steps, betas=betas, eps=eps, of=of
    )


def _effective_dimension(
    s: ProbeContext, *, vectors: int = 2, steps: int = 100, regulariser: float = 1.0, of: Matrix = "hessian"
) -> Any:
    """Of all eigenvalues, by the nodes and weights of the spectral density."""
    density = spectral_density(s.space, s.oracle, vectors=vectors, steps=steps, of=of)
    each = [
        effective_dimension(nodes, weights=weights, dimension=density.dimension, regulariser=regulariser).value
        for nodes, weights in zip(density.nodes, density.weights, strict=True)
    ]
    error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else math.nan
    return as_json(
        {"value": fmean(each), "standard_error": error, "products": density.products, "seconds": density.seconds}
    )


def _ritz_dimension(s: ProbeContext, *, steps: int = 100, regulariser: float = 1.0, of: str = "hessian") -> Any:
    """Of the Ritz values of so many Lanczos iterations, converged or not, each counted once: the LPF paper's code."""
    a = normalised(s.space, s.oracle) if of == "normalised" else operator(s.space, s.oracle, of=of)  # type: ignore[arg-type]
    found = spectral_density(s.space, s.oracle, vectors=1, steps=min(steps, a.dimension), of=a)
    told = effective_dimension(found.nodes[0], regulariser=regulariser)
    return {"value": told.value, "products": found.products, "seconds": found.seconds}


def _inverse_valley(s: ProbeContext) -> Any:
    assert s.branches is not None
    found = mean_valley(s.space, s.oracle, workers=s.branches())
    return {"value": found.inverse, "forwards": found.forwards, "seconds": found.seconds}


def _distance(s: ProbeContext) -> Any:
    assert s.initial is not None
    return {"value": s.space.norm(s.space.weights - s.initial)}


def _noise(s: ProbeContext) -> Any:
    return noise_scale(s.space, s.batches())


def _surface(
    s: ProbeContext, *, along: str = "random", dimensions: int = 2, points: int = 21, extent: float = 1.0, draw: int = 0
) -> Any:
    """A slice through the weights: +- extent along random filter-normalised directions or eigenvectors (of length 1);
    along the trajectory's principal components as far as it went, with its path.
    """
    if points < 2 or not 0 < extent < math.inf:
        raise UserError(f"points={points} must be >= 2 and extent={extent} > 0.")
    path: list[list[float]] | None = None
    grids = [(-extent, extent)] * 2
    vectors: Any = "random"
    if along == "eigenvectors":
        vectors = lanczos(s.space, s.oracle, k=dimensions, vectors=True).vectors
    elif along == "trajectory":
        if s.window is None or len(s.window) < 3:
            raise UserError(
                "along=trajectory needs a trajectory probe that has seen three points; add trajectory: {…}."
            )
        vectors = trajectory_pca(s.window, components=dimensions).directions
        dimensions = len(vectors)
        steps = s.window.differences
        path = [list(p) for p in project(s.space, steps, vectors, dimensions=dimensions, origin=steps[-1]).coordinates]
        grids = [_around(values) for values in zip(*path, strict=True)]
    elif along != "random":
        raise UserError(f"along={along!r} is unknown; use random, eigenvectors or trajectory.")
    alphas, betas = (torch.linspace(*grid, points).tolist() for grid in (grids * 2)[:2])
    found = surface(
        s.space, s.oracle, along=vectors, dimensions=dimensions, alphas=alphas, betas=betas, kind=along, draw=draw
    )
    kind = "principal components" if along == "trajectory" else along
    return {**as_json(found), "betas": betas if dimensions == 2 else None, "directions": kind, "path": path}


def _connectivity(
    s: ProbeContext,
    *,
    curve: Curve = "line",
    points: int = 21,
    steps: int = 100,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Any:
    """The loss on the way from the other model to this one."""
    assert s.other is not None
    start, end = s.other, s.space.weights.clone()
    return mode_connectivity(
        s.space, s.oracle, start=start, end=end, curve=curve, points=points, steps=steps, learning_rate=learning_rate,
        seed=seed,
    )  # fmt: skip


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The range of some coordinates and of 0, the present weights, and a quarter of it on both sides."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    return low - (high - low) / 4, high + (high - low) / 4


MEASURES: dict[str, Measure] = {
    "adaptive_sharpness": _probe(sam_sharpness, adaptive=True, rho=0.5),
    "distance_from_start": _needing("initial", _asking(_distance)),
    "edge_of_stability": _needing("learning_rate", _asking(_edge)),
    "effective_dimension": _asking(_effective_dimension),
    "epsilon_sharpness": _probe(epsilon_sharpness),
    "fisher_rao": _probe(fisher_rao),
    "frobenius": _probe(frobenius),
    "gradient_norm": _probe(gradient_norm),
    "hutchpp": _probe(hutchpp),
    "inverse_mean_valley": _needing("branches", _asking(_inverse_valley)),
    "lambda_max": _probe(lanczos, k=1),
    "lobpcg": _probe(lobpcg),
    "local_entropy": _probe(local_entropy),
    "local_entropy_gradient": _probe(local_entropy_gradient),
    "logit_share": _probe(logit_share),
    "lpf": _probe(lpf),
    "mode_connectivity": _needing("other", _asking(_connectivity)),
    "noise_scale": _asking(_noise),
    "pac_bayes": _needing("initial", _probe(pac_bayes, lambda s: {"initial": s.initial, "samples": s.samples})),
    "power_iteration": _probe(power_iteration),
    "ritz_dimension": _asking(_ritz_dimension),
    "sam_sharpness": _probe(sam_sharpness),
    "shannon_entropy": _probe(shannon_entropy),
    "spectral_density": _probe(spectral_density),
    "surface": _asking(_surface),
    "top_eigenvalues": _probe(lanczos),
    "trace": _probe(hutchinson),
    "weight_norm": _asking(lambda s: {"value": s.space.norm(s.space.weights)}),
    "xtrace": _probe(xtrace),
}


def _preset(of: str, chosen: Mapping[str, Any]) -> Measure:
    base = MEASURES[of]

    def ask(s: ProbeContext, **own: Any) -> Any:
        return base.ask(s, **{**chosen, **own})

    return replace(base, ask=ask, settings={**base.settings, **chosen})


MEASURES |= {name: _preset(*preset) for name, preset in PRESETS.items()}
OURS = tuple(sorted(MEASURES))
"""The names that are there before anybody registers one."""
GROUP = "elastic_lsopt.probes"
"""The entry points by which a package announces probes of its own."""


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a probe known under `name`: `probe(space, oracle, *, setting=default, …)`, whose settings are its
    keyword-only arguments. Raises ValueError for a name that is taken."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in MEASURES:
            raise ValueError(f"measure name {name!r} is taken; choose another.")
        MEASURES[name] = _of_others(name, function)
        return function

    return note


def _theirs(name: str) -> Measure | None:
    """A measure that is none of ours: at an import path "module:function", or announced by an installed package."""
    paths = [name] if ":" in name else [entry.value for entry in entry_points(group=GROUP, name=name)]
    return next((_of_others(name, imported("measure", path)) for path in paths), None)


def _of_others(name: str, function: Any) -> Measure:
    """A probe of a user's own; a keyword-only argument without a default is a setting that must be given."""
    if isinstance(function, type) or not callable(function):
        what = "a class" if isinstance(function, type) else f"a {type(function).__name__}"
        raise UserError(f"measure {name!r} is {what}; write a function probe(space, oracle, *, setting=default).")
    takes = inspect.signature(function).parameters.values()
    required = tuple(p.name for p in takes if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
    found = _probe(function)

    def ask(s: ProbeContext, **own: Any) -> Any:
        told = found.ask(s, **own)
        if not isinstance(told, Mapping) and not is_dataclass(told):
            raise UserError(f"measure {name!r} returned a {type(told).__name__}; return a dict such as {{'value': …}}.")
        return told

    return replace(found, ask=ask, settings={**found.settings, **dict.fromkeys(required)}, required=required)


def measure(name: str, settings: Mapping[str, Any], known: Collection[str] = tuple(NEEDS)) -> Measure:
    """The measure of that name; `known` are the keys of NEEDS that are known where it will be taken.

    Raises UserError, with the nearest name, for an unknown one or an unknown setting, and for one that needs more.
    """
    if name not in MEASURES and (found := _theirs(name)) is not None:
        MEASURES[name] = found
    if name not in MEASURES:
        there = {name: found for name, found in MEASURES.items() if found.needs is None or found.needs in known}
        raise UserError(f"unknown measure {name!r}{_nearest(name, there)}")
    found = MEASURES[name]
    if found.needs is not None and found.needs not in known:
        raise UserError(f"{name} needs {NEEDS[found.needs]}.")
    for key in settings:
        if key not in found.settings:
            raise UserError(f"measure {name!r} has no setting {key!r}{_nearest(key, found.settings)}")
        _refuse_other_kind(name, key, settings[key], found.settings[key])
    if missing := [key for key in found.required if key not in settings]:
        raise UserError(f"measure {name!r} needs the setting {', '.join(missing)}; give it.")
    return found


def _refuse_other_kind(name: str, key: str, value: Any, default: Any) -> None:
    """A value of another kind than the default would fail in the middle of a measurement."""
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"), int: ((int,), "a whole number"), str: ((str,), "a name"),
        float: ((int, float), "a number (YAML reads 1e-3 as text: write 1.0e-3)"),
    }  # fmt: skip
    if type(default) not in kinds:
        return
    allowed, words = kinds[type(default)]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise UserError(f"{name}.{key}={value!r} must be {words}.")


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}."


def headline(told: Mapping[str, Any]) -> float:
    """A result's one number: its `value`, else its largest eigenvalue; NaN where it has none."""
    value = told.get("value", next(iter(told.get("eigenvalues") or []), None))
    return math.nan if value is None else float(value)


def as_json(result: Any) -> Any:
    """A result's numbers, lists and names; vectors stay behind, and what is not finite becomes None."""
    if is_dataclass(result) and not isinstance(result, type):
        pairs = [(f.name, getattr(result, f.name)) for f in fields(result) if not f.name.startswith("_")]
        computed = [n for n, v in vars(type(result)).items() if isinstance(v, property) and not n.startswith("_")]
        return as_json(dict(pairs + [(n, getattr(result, n)) for n in computed]))
    if isinstance(result, Mapping):
        return {str(k): as_json(v) for k, v in result.items() if not isinstance(v, Vector | Basis | Operator)}
    if isinstance(result, Tensor):
        return as_json(result.tolist())
    if isinstance(result, list | tuple):
        return [as_json(v) for v in result if not isinstance(v, Vector | Basis)]
    if isinstance(result, float) and not math.isfinite(result):
        return None
    if result is not None and not isinstance(result, bool | int | float | str):
        raise UserError(f"a measure gave a {type(result).__name__}; it must give numbers, names, or lists of them.")
    return result
