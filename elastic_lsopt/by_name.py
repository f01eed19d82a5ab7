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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from elastic_lsopt.errors import UserError

T = TypeVar("T", bound=type)


class Registry:
    """The algorithms of one kind. `ours` maps a name to the module that registers it, imported when it is asked for;
    `defines` is what each class must have."""

    def __init__(self, kind: str, *, group: str, ours: Mapping[str, str], defines: Sequence[str] = ()) -> None:
        self.kind, self.group, self._defines = kind, group, defines
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
            raise UserError(
                f'unknown {self.kind} {name!r}{nearest(name, self.names(), "Known")} (one of your own: "module:Class").'
            )
        return self._known[name]

    def build(self, name: str, /, **hyperparameters: Any) -> Any:
        """An instance with these hyper-parameters. Raises UserError for one that it does not have, or out of range."""
        return built(self.kind, name, self.get(name), hyperparameters, self._defines)

    def origin(self, name: str) -> str | None:
        """The package that announces a name by an entry point, and what it announces; None for ours."""
        if name in self._ours:
            return None
        found = [
            f"{e.dist.name if e.dist else 'a package'}: {e.value}" for e in entry_points(group=self.group, name=name)
        ]
        return found[0] if found else "this program"

    def name_of(self, kind: type) -> str:
        """What a class is called: its name here, else its own."""
        return next((n for n, c in self._known.items() if c is kind), kind.__name__.lower())

    def _imported(self, path: str) -> type:
        found = imported(self.kind, path)
        if not isinstance(found, type):
            raise UserError(f"{self.kind} import={path!r} is a {type(found).__name__}; name a class.")
        return found


def built(kind: str, name: str, found: type, hyperparameters: Mapping[str, Any], defines: Sequence[str] = ()) -> Any:
    """An instance of a class. Raises UserError for a hyper-parameter that it does not have, that is missing or out of
    range, and for a class that does not define what its kind must."""
    lacks = [n for n in defines if getattr(getattr(found, n, None), "__isabstractmethod__", not _has(found, n))]
    if lacks:
        raise UserError(f"{kind} {name!r} ({found.__qualname__}) must define {', '.join(lacks)}: see docs/authors.md.")
    if is_dataclass(found):
        own = {f.name: f for f in fields(found) if f.init}
        for key in hyperparameters:
            if key not in own:
                raise UserError(f"{kind} {name!r} has no hyper-parameter {key!r}{nearest(key, own, 'It has')}.")
        needed = [n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING]
        if missing := [n for n in needed if n not in hyperparameters]:
            raise UserError(
                f"{kind} {name!r} needs {', '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}."
            )
    try:
        return found(**hyperparameters)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {name!r}: {error}") from error


def _has(found: type, name: str) -> bool:
    return hasattr(found, name) or (is_dataclass(found) and any(f.name == name for f in fields(found)))


def imported(kind: str, path: str) -> Any:
    """What "module:name" names. Raises UserError where there is none."""
    module, _, name = path.partition(":")
    try:
        home = import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{kind} {path!r} does not load: {error}; modules are looked for where the command is started and on "
            "PYTHONPATH."
        ) from error
    if not hasattr(home, name):
        own = [n for n, v in vars(home).items() if getattr(v, "__module__", None) == module]
        raise UserError(f"{kind} {path!r} does not load: {module} has no {name!r}{nearest(name, own, 'it has')}.")
    return getattr(home, name)


def nearest(word: str, known: Iterable[str], there: str = "known") -> str:
    """The end of a sentence about a word that is none of `known`."""
    words = list(known)
    near = difflib.get_close_matches(word, words, 1)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" {there}: {', '.join(words) or 'none'}"


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """One line for a hyper-parameter out of range."""
    if not condition:
        raise UserError(f"{name}={value!r} must be {limit}.")


def require_number(name: str, value: object, *, positive: bool = False) -> None:
    """A finite number >= 0, or > 0 (a string is none: YAML reads 5e-2 as one)."""
    number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
    require(number and not (positive and value == 0), name, value, f"a number {'>' if positive else '>='} 0")


def require_betas(value: Any) -> None:
    """Two numbers in [0, 1)."""
    two = isinstance(value, tuple | list) and len(value) == 2
    right = two and all(isinstance(b, int | float) and 0 <= b < 1 for b in value)
    require(right, "betas", value, "two numbers >= 0 and < 1")


def require_share(name: str, value: object) -> None:
    """A number in [0, 1)."""
    require(isinstance(value, int | float) and 0 <= value < 1, name, value, "a number >= 0 and < 1")


def require_count(name: str, value: object, *, least: int = 1) -> None:
    """A whole number >= 1, or >= `least`."""
    require(isinstance(value, int) and value >= least, name, value, f"a whole number >= {least}")
