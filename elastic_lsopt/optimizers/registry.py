"""Methods by name: ours register themselves, a third party's come by entry points in group `elastic_lsopt.methods`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

State = dict[str, Vector | float | int]
"""All that a method remembers: named Vectors and scalars, saved and resharded by name."""


class Method(Protocol):
    """A frozen keyword-only dataclass whose fields are the hyper-parameters."""

    @property
    def parts(self) -> int:
        """Into how many parts the global batch is cut (1: each pass sees all of it at one point)."""
        ...

    def init(self, space: ParameterSpace) -> State:
        """What the method remembers before its first step."""
        ...

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        """The vector that the base steps with; may update `state` in place. The weights are back on return."""
        ...


_methods: dict[str, type] = {}
_GROUP = "elastic_lsopt.methods"
_OURS = ("none", "sam", "asam", "lpf_sgd")
T = TypeVar("T", bound=type)


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a method known under `name`. Raises ValueError for a name that is taken."""

    def note(method: T) -> T:
        if _methods.setdefault(name, method) is not method:
            raise ValueError(f"method name {name!r} is taken by {_methods[name].__qualname__}; choose another.")
        return method

    return note


def names() -> list[str]:
    """The names of all methods, ours and third parties', in alphabetical order."""
    return sorted({*_load_ours(), *(e.name for e in entry_points(group=_GROUP))})


def get(name: str) -> type:
    """The method class of that name. Raises UserError, with the nearest name, where there is none."""
    if name not in _load_ours():
        for entry in entry_points(group=_GROUP, name=name):
            try:
                method = entry.load()
            except (ImportError, AttributeError) as error:
                raise UserError(
                    f"method {name!r} is announced as {entry.value!r}, which does not load: {error}."
                ) from error
            register(name)(method)
    if name not in _methods:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown method {name!r}{hint} Known: {', '.join(names())}.")
    return _methods[name]


def build(name: str, **hyperparameters: Any) -> Any:
    """The method with these hyper-parameters. Raises UserError for one that it does not have, or out of range."""
    method = get(name)
    known = [f.name for f in fields(method)]
    for key in hyperparameters:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"method {name!r} has no hyper-parameter {key!r}; {hint}It has: {', '.join(known) or 'none'}."
            )
    try:
        return method(**hyperparameters)
    except TypeError as error:
        raise UserError(f"method {name!r}: {error}") from error


def _load_ours() -> dict[str, type]:
    for name in _OURS:
        import_module(f"elastic_lsopt.optimizers.{'plain' if name == 'none' else name}")
    return _methods


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """One line for a hyper-parameter out of range."""
    if not condition:
        raise UserError(f"{name}={value!r} must be {limit}.")


def require_number(name: str, value: object) -> None:
    """A finite number >= 0 (a string is none: YAML reads 5e-2 as one)."""
    require(isinstance(value, int | float) and math.isfinite(value) and value >= 0, name, value, "a number >= 0")


def require_count(name: str, value: object) -> None:
    """A whole number >= 1."""
    require(isinstance(value, int) and value >= 1, name, value, "a whole number >= 1")
