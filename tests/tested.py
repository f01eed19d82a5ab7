"""On which backends and numbers of ranks the suite runs each algorithm, from the tests that pytest has collected.

    {"method": {"sam": {"on": {"ddp": [1, 2, 3], …}, "in": ["tests/laws/test_cover.py", …]}}}

A case counts where its parameters name a backend, and the algorithm too, by its name or as an instance or class of it;
or where the test's own name or its file's does, such as `test_muon_under_zero` or `test_ema.py`. Tests of refusals and
those that only run on a GPU do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.methods import REGISTRIES
from tests.cases.engines import FRAMEWORK, ZERO

BACKENDS = (*FRAMEWORK, "native", *ZERO)
"""By the names that the tests' `kind` has, in this order; more words of a kind follow a dash: zero2-offload."""
COMMON = ("none", "plain")
"""Names that mean other things too: counted only where the axis says that it is the method."""
FORMS = ("_sgd", "_adamw")
"""What the tests add to the name of an update with two forms."""
Named = tuple[str, str]


def tested_text(items: list[pytest.Item]) -> str:
    """The text of elastic_lsopt/tested.json."""
    known = {name: registry for registry in REGISTRIES for name in registry.names() if registry.origin(name) is None}
    classes = {registry.get(name): name for name, registry in known.items()}
    on: dict[Named, dict[str, set[int]]] = {}
    files: dict[Named, set[str]] = {}
    for item in items:
        path, _, test = item.nodeid.partition("[")[0].partition("::")
        if "refuse" in test or path.startswith("tests/gpu/"):
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        said = [*_values(parameters)]
        worlds = {value for axis, value in said if axis == "world" and isinstance(value, int)}
        if isinstance(sizes := parameters.get("sizes"), list):  # of replicas
            worlds.add(sum(sizes))
        backends = {str(v) for a, v in said if a in ("kind", "stage", "saved", "loaded") and _is_backend(v)}
        for name in {*_algorithms(said, classes), *_words_of(path, test, known)} if backends else ():
            key = known[name].kind, name
            files.setdefault(key, set()).add(path)
            for backend in sorted(backends):
                on.setdefault(key, {}).setdefault(backend, set()).update({1} if backend == "plain" else worlds)
    told: dict[str, Any] = {}
    for kind, name in sorted(on):
        backends = {b: sorted(worlds) for b, worlds in sorted(on[kind, name].items(), key=lambda item: _rank(item[0]))}
        told.setdefault(kind, {})[name] = {"on": backends, "in": sorted(files[kind, name])}
    return _a_line_each(told)


def _a_line_each(told: dict[str, Any]) -> str:
    """An algorithm a line: branches that add some do not collide."""
    kinds = []
    for kind, of in told.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in of.items())
        kinds.append(f" {json.dumps(kind)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def _values(given: Any, axis: str = "") -> Iterator[tuple[str, Any]]:
    """All that the parameters hold, with the nearest name around it."""
    yield axis, given
    if isinstance(given, dict):
        for key, value in given.items():
            yield from _values(value, str(key))
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _values(value, axis)
    elif is_dataclass(given) and not isinstance(given, type):
        for field in fields(given):
            yield from _values(getattr(given, field.name), field.name)


def _algorithms(said: list[tuple[str, Any]], classes: dict[type, str]) -> Iterator[str]:
    for axis, value in said:
        if isinstance(value, str):
            known = {value, *(value.removesuffix(form) for form in FORMS)} & {*classes.values()}
            if known and (axis == "method" or value not in COMMON):
                yield from known
        elif (kind := value if isinstance(value, type) else type(value)) in classes:
            yield classes[kind]


def _words_of(path: str, test: str, known: Any) -> Iterator[str]:
    whole = f"_{Path(path).stem.removeprefix('test_')}_", f"_{test.removeprefix('test_')}_"
    for name in known:
        if name not in COMMON and any(f"_{name}_" in text for text in whole):
            yield name


def _is_backend(value: Any) -> bool:
    return isinstance(value, str) and value.partition("+")[0].partition("-")[0] in {
        b.partition("-")[0] for b in BACKENDS
    }


def _rank(backend: str) -> tuple[int, str]:
    first = [i for i, known in enumerate(BACKENDS) if backend.startswith(known)]
    return (max(first) if first else len(BACKENDS)), backend
