"""Algorithms by name: ours, those that a program registers, and those that an installed package announces.

    methods = Registry("method", group="elastic_lsopt.methods", ours={"sam": "elastic_lsopt.optimizers.sam"})
    @methods.register("sam")                        a class decorator
    methods.build("sam", rho=0.05)                  UserError, with the nearest name, for what is not known

A third party's package announces its class by an entry point in the group, `name = "module:Class"`; a class that
nobody announces is given as "module:Class" in place of a name. Ours and theirs go through the same door.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from elastic_lsopt.errors import UserError

T = TypeVar("T", bound=type)


class Registry:
    """The algorithms of one kind. `ours` maps a name to the module that registers it, imported when it is asked for."""

    def __init__(self, kind: str, *, group: str, ours: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._ours = dict(ours)
        self._known: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: make a class known under `name`. Raises ValueError for a name that is taken."""

        def note(found: T) -> T:
            if name in self._ours and found.__module__ != self._ours[name]:
                import_module(self._ours[name])
            known = self._known.setdefault(name, found)
            if known is not found:
                raise ValueError(f"{self.kind} name {name!r} is taken by {known.__qualname__}; choose another.")
            return found

        return note

    @property
    def known(self) -> dict[str, type]:
        """What has been registered or asked for so far, by name."""
        return dict(self._known)

    def names(self) -> list[str]:
        """All names, ours and third parties', in alphabetical order."""
        return sorted({*self._ours, *self._known, *(e.name for e in entry_points(group=self.group))})

    def get(self, name: str) -> type:
        """The class of that name, or of an import path "module:Class". Raises UserError where there is none."""
        if ":" in name:
            return self._imported(name)
        if name not in self._known and name in self._ours:
            import_module(self._ours[name])
        if name not in self._known:
            for entry in entry_points(group=self.group, name=name):
                try:
                    found = entry.load()
                except (ImportError, AttributeError) as error:
                    raise UserError(
                        f"{self.kind} {name!r} is announced as {entry.value!r}, which does not load: {error}."
                    ) from error
                self.register(name)(found)
        if name not in self._known:
            raise UserError(f"unknown {self.kind} {name!r}{self._nearest(name)} Known: {', '.join(self.names())}.")
        return self._known[name]

    def build(self, name: str, **hyperparameters: Any) -> Any:
        """An instance with these hyper-parameters. Raises UserError for one that it does not have, or out of range."""
        found = self.get(name)
        known = [f.name for f in fields(found)] if is_dataclass(found) else list(hyperparameters)
        for key in hyperparameters:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(
                    f"{self.kind} {name!r} has no hyper-parameter {key!r}; {hint}It has: {', '.join(known) or 'none'}."
                )
        try:
            return found(**hyperparameters)
        except TypeError as error:
            raise UserError(f"{self.kind} {name!r}: {error}") from error

    def _imported(self, path: str) -> type:
        module, _, name = path.partition(":")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{self.kind} import={path!r} does not load: {error}.") from error
        if not isinstance(found, type):
            raise UserError(f"{self.kind} import={path!r} is a {type(found).__name__}; name a class.")
        return found

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), 1)
        return f"; did you mean {near[0]!r}?" if near else ""


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """One line for a hyper-parameter out of range."""
    if not condition:
        raise UserError(f"{name}={value!r} must be {limit}.")


def require_number(name: str, value: object) -> None:
    """A finite number >= 0 (a string is none: YAML reads 5e-2 as one)."""
    require(isinstance(value, int | float) and math.isfinite(value) and value >= 0, name, value, "a number >= 0")


def require_share(name: str, value: object) -> None:
    """A number in [0, 1)."""
    require(isinstance(value, int | float) and 0 <= value < 1, name, value, "a number >= 0 and < 1")


def require_count(name: str, value: object) -> None:
    """A whole number >= 1."""
    require(isinstance(value, int) and value >= 1, name, value, "a whole number >= 1")
