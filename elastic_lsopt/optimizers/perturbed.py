"""Which parameters a method moves: all, or those that patterns of their names choose.

    perturb: {exclude: ["*norm*", "*.bias"]}         all but these
    perturb: {match: "model.layers.*", dims: 2}      the matrices of the layers, and nothing else

A pattern is a shell's: * matches anything, dots too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch

from elastic_lsopt.by_name import nearest
from elastic_lsopt.errors import UserError
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Parameter
from elastic_lsopt.space.vector import Scales

Perturb = dict[str, Any]
"""{match: patterns, exclude: patterns, dims: number of dimensions}; {} is all parameters."""
KEYS = ("match", "exclude", "dims")


def require_perturb(value: Any) -> None:
    """One line for what is no such mapping."""
    if not isinstance(value, Mapping):
        raise UserError(f'perturb={value!r} must be a mapping, such as {{exclude: ["*norm*"]}}.')
    for key in value:
        if key not in KEYS:
            raise UserError(f"perturb has no key {key!r}{nearest(str(key), KEYS, 'It has')}.")
    for key in ("match", "exclude"):
        given = _patterns(value.get(key, ()))
        if not all(isinstance(pattern, str) for pattern in given):
            raise UserError(f"perturb.{key}={value[key]!r} must be a pattern or a list of patterns.")
    dims = value.get("dims")
    if dims is not None and (not isinstance(dims, int) or isinstance(dims, bool) or dims < 0):
        raise UserError(f"perturb.dims={dims!r} must be a whole number >= 0: the dimensions of a parameter.")


def chosen(perturb: Perturb, space: ParameterSpace) -> tuple[bool, ...]:
    """For each parameter of the space whether it is moved.

    Raises UserError for a pattern that no parameter matches, and where none is left to move.
    """
    match, exclude = _patterns(perturb.get("match", "*")), _patterns(perturb.get("exclude", ()))
    return _chosen(space.layout.parameters, match, exclude, perturb.get("dims"))


@lru_cache(maxsize=8)
def _chosen(
    parameters: tuple[Parameter, ...], match: tuple[str, ...], exclude: tuple[str, ...], dims: int | None
) -> tuple[bool, ...]:
    names = [p.name for p in parameters]
    for pattern in (*match, *exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"perturb: no parameter matches {pattern!r}; names are such as {', '.join(map(repr, names[:3]))}."
            )
    taken = tuple(
        any(fnmatchcase(p.name, pattern) for pattern in match)
        and not any(fnmatchcase(p.name, pattern) for pattern in exclude)
        and dims in (None, len(p.shape))
        for p in parameters
    )
    if not any(taken):
        raise UserError(
            f"perturb: no parameter is left to move (match={list(match)}, exclude={list(exclude)}, dims={dims})."
        )
    return taken


def masked(scale: float | Scales, taken: Sequence[bool], space: ParameterSpace) -> float | Scales:
    """The scale, and 0 for each parameter that is not taken."""
    if all(taken):
        return scale
    device = space.shards.device
    mask = torch.tensor(taken, dtype=torch.float64, device=device)
    if isinstance(scale, Scales) and scale.per == "row":
        rows = torch.tensor([p.rows for p in space.layout.parameters], device=device)
        return Scales(scale.values * mask.repeat_interleave(rows), "row")
    return Scales(mask * (scale.values if isinstance(scale, Scales) else scale), "parameter")


def norm_of_taken(norms: Scales, taken: Sequence[bool]) -> Scales:
    """The length of the taken part of a Vector, from its length per parameter: a scale for the whole model."""
    mask = torch.tensor(taken, device=norms.values.device)
    return Scales(norms.values[mask].square().sum().sqrt().reshape(1), "model")


def _patterns(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
