"""`elastic-lsopt methods [NAME]`: every method, update, average and rule of consensus, ours and third parties', and
what each costs.

All is read from the registries and from the classes: their module's first sentence, their `facts`, their fields. Where
one is tested is what the test suite's collection has written to `tested.json`: see tests/manifest.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from elastic_lsopt.averages.registry import averages
from elastic_lsopt.by_name import Registry, nearest
from elastic_lsopt.cli.terminal.tables import console_of_tables
from elastic_lsopt.config.pages import examples
from elastic_lsopt.config.pages.reference import Own, annotated, in_words, yaml_of
from elastic_lsopt.consensus.registry import rules
from elastic_lsopt.errors import UserError
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import methods as gradient_rules
from elastic_lsopt.updates.registry import updates

REGISTRIES: tuple[Registry, ...] = (gradient_rules, updates, averages, rules)
TESTED = Path(__file__).parents[1] / "tested.json"
UNKNOWN = "-"
"""In place of what a class does not say."""
WIDE_ENOUGH = 120
"""Columns of a terminal from which on the cells are beside each other."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One of the registries' names, and what its class says of itself; "-" where it says nothing."""

    kind: str
    name: str
    summary: str = UNKNOWN
    paper: str = UNKNOWN
    passes: str = UNKNOWN
    memory: str = UNKNOWN
    communication: str = UNKNOWN
    needs: str = UNKNOWN
    tested: str = UNKNOWN
    """The backends of the suite's runs, and the most ranks."""
    tested_on: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Those backends and their variants, each with its numbers of ranks."""
    tests: tuple[str, ...] = ()
    """The files of those runs."""
    announced_by: str | None = None
    """The package that brings it, and its class; None: this one."""
    found: type | None = field(default=None, compare=False)

    def told(self) -> dict[str, Any]:
        """What of it goes into a JSON object."""
        return {key: value for key, value in asdict(self).items() if key != "found"}


def methods(name: str | None = None, *, as_json: bool = False) -> int:
    """Print all, or one in full; returns 0. Raises UserError, with the nearest name, for one that is not known."""
    listed = list(known())
    chosen = [one for one in listed if name in (None, one.name)]
    if not chosen:
        assert name is not None
        names = dict.fromkeys(one.name for one in listed)
        raise UserError(
            f"no method, update, average or rule of consensus is called {name!r}{nearest(name, names, 'there are')}."
        )
    if as_json:
        own = [one.told() | ({"fields": [asdict(f) for f in fields_of(one.found)]} if name else {}) for one in chosen]
        print(json.dumps(own, indent=2, default=str))
    elif name is None:
        _print_all(listed)
    else:
        for one in chosen:
            print(in_full(one))
    return 0


def known() -> Iterable[Algorithm]:
    """All that the registries know, ours and those of installed packages; one that does not load says why."""
    tested = json.loads(TESTED.read_text(encoding="utf-8"))
    for registry in REGISTRIES:
        for name in registry.names():
            origin = registry.origin(name)
            try:
                found = registry.get(name)
            except Exception as error:  # a package of somebody else's, whatever its import raises
                summary = " ".join(str(error).split()) or type(error).__name__
                yield Algorithm(kind=registry.kind, name=name, summary=summary, announced_by=origin)
                continue
            own = tested.get(registry.kind, {}).get(name) if origin is None else None
            facts = getattr(found, "facts", None)
            said = asdict(facts) if isinstance(facts, Facts) else {}
            yield Algorithm(
                kind=registry.kind, name=name, summary=_first_sentence(found), announced_by=origin, found=found,
                tested=_in_short(own["on"]) if own else UNKNOWN, tested_on=own["on"] if own else {},
                tests=tuple(own["in"]) if own else (), **{key: value or UNKNOWN for key, value in said.items()},
            )  # fmt: skip


def _first_sentence(found: type) -> str:
    """Of its module where that is one algorithm's, else of the class."""
    whole = _module_text(found)
    first = " ".join(whole.split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".:") or UNKNOWN


def _module_text(found: type) -> str:
    module = sys.modules[found.__module__]
    others = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == found.__module__]
    one_paper = sum(hasattr(c, "facts") for c in others) == 1
    return inspect.cleandoc((module.__doc__ if one_paper else None) or found.__doc__ or module.__doc__ or "")


def _in_short(on: Mapping[str, Sequence[int]]) -> str:
    """Without variants: plain, ddp, fsdp2, hsdp, zero0-3; up to 4 ranks."""
    names = dict.fromkeys(re.split(r"[-+]", backend)[0] for backend in on)
    stages = "".join(sorted(name[4] for name in names if re.fullmatch(r"zero\d", name)))
    zero = [f"zero{stages[0]}-{stages[-1]}"] if len(stages) > 1 and stages in "0123" else [f"zero{s}" for s in stages]
    plain = [name for name in names if name in ("plain", "ddp", "fsdp2", "hsdp")]
    most = max((world for worlds in on.values() for world in worlds), default=1)
    return f"{', '.join([*plain, *zero])}; up to {most} rank{'s' if most > 1 else ''}"


def _by_ranks(on: Mapping[str, Sequence[int]]) -> list[str]:
    """Backends that were run on the same numbers of ranks together, a line each."""
    by_worlds: dict[tuple[int, ...], list[str]] = {}
    for backend, worlds in on.items():
        by_worlds.setdefault(tuple(worlds), []).append(backend)
    ranks = {worlds: f" on {', '.join(map(str, worlds))} rank{'s' if worlds != (1,) else ''}" for worlds in by_worlds}
    return [f"{', '.join(names)}{ranks[worlds] if worlds else ''}" for worlds, names in by_worlds.items()]


# -- one in full -------------------------------------------------------------------------------------------------------


def in_full(one: Algorithm) -> str:
    """Its recurrence, its fields, its costs and an example."""
    parts = [f"{one.name}: {'an' if one.kind[0] in 'aeiou' else 'a'} {one.kind}", ""]
    if one.announced_by is not None:
        parts += [f"Announced by {one.announced_by}.", ""]
    if one.found is None:
        return "\n".join([*parts, one.summary])
    parts += [_module_text(one.found) or "It says nothing of itself.", ""]
    costs = {key: getattr(one, key) for key in ("paper", "passes", "memory", "communication", "needs")}
    parts += [*(f"{key + ':':<15}{value}" for key, value in costs.items())]
    for key, lines in (("tested:", _by_ranks(one.tested_on) or [UNKNOWN]), ("in:", one.tests)):
        parts += [f"{'' if i else key:<15}{line}" for i, line in enumerate(lines)]
    own = fields_of(one.found)
    if own:
        parts += ["", "Fields:", ""]
        for f in own:
            parts += [
                f"  {f.name}: {f.takes}; default {yaml_of(f.default)}",
                *([f"      {f.meaning}"] if f.meaning else []),
            ]
    return "\n".join([*parts, "", "In a job's YAML:", "", *(f"  {line}" for line in _example(one, own)), ""])


def fields_of(found: type | None) -> list[Own]:
    """Its hyper-parameters, inherited ones too, with what its source says below each."""
    if found is None or not is_dataclass(found):
        return []
    said: dict[str, tuple[str, str]] = {}
    for kind in reversed(found.__mro__):
        try:
            [body] = ast.parse(dedent(inspect.getsource(kind))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # made by a program, not written in a file
            continue
        if isinstance(body, ast.ClassDef):
            said |= {node.target.id: (_words(node.annotation), meaning) for node, meaning in annotated(body)}
    made = []
    for f in fields(found):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        takes, meaning = said.get(f.name, (str(f.type), ""))
        made.append(Own(f.name, takes, None if default is MISSING else default, meaning))
    return made


def _words(annotation: ast.expr) -> str:
    try:
        return in_words(annotation)
    except (ValueError, KeyError):
        return ast.unparse(annotation)


def _example(one: Algorithm, own: list[Own]) -> list[str]:
    values = {f.name: f.default for f in own if f.default is not None and not (one.kind == "average" and not f.default)}
    match one.kind:
        case "method":
            lines = {"landscape": {"method": one.name, **values}}
        case "update":
            lines = {"optim": one.name, **({"optim_args": values} if values else {})}
        case "average":
            lines = {"averages": {one.name: values}}
        case _:
            lines = {"consensus": {"rule": one.name, "replicas": 4, **values, **examples.EXCHANGE.get(one.name, {})}}
    beside = examples.BESIDE.get(one.name, ()) if one.announced_by is None else ()
    return [*beside, *(f"{key}: {yaml_of(value)}" for key, value in lines.items())]


# -- all in a table ----------------------------------------------------------------------------------------------------


def _print_all(listed: list[Algorithm]) -> None:
    out = console_of_tables()
    for kind in dict.fromkeys(one.kind for one in listed):
        out.print(
            _table(
                out,
                kind.replace("rule", "rules") if " " in kind else f"{kind}s",
                [one for one in listed if one.kind == kind],
            )
        )
    out.print(
        "passes: gradients of the global batch per step; memory: numbers per parameter kept between steps, 1/N of them "
        "per rank, and what there is in between; tested: the backends (and numbers of ranks) on which the test suite "
        "runs it. One in full: elastic-lsopt methods NAME.",
        markup=False,
    )


def _table(out: Console, title: str, rows: list[Algorithm]) -> Table:
    columns = ("name", "what it is", "passes", "memory", "communication", "needs", "tested")
    cells = [
        (one.name, one.summary, one.passes, one.memory, one.communication, one.needs,
         one.tested if one.announced_by is None else f"{UNKNOWN} ({one.announced_by})")
        for one in rows
    ]  # fmt: skip
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD if out.is_terminal else None)
    narrow = out.is_terminal and out.width < WIDE_ENOUGH
    if narrow:  # three columns that fold are read more easily than seven
        made.add_column("name", no_wrap=True)
        made.add_column("what it is, and what it costs", overflow="fold")
        for row in cells:
            told = [f"{key} {value}" for key, value in zip(columns[2:], row[2:], strict=True) if value != UNKNOWN]
            made.add_row(row[0], f"{row[1]}\n{'; '.join(told)}")
        return made
    for i, name in enumerate(columns):
        if out.is_terminal:
            made.add_column(name, no_wrap=not i, overflow="fold")
        else:  # a pipe takes lines of any length, and a tool that reads them wants one each
            made.add_column(name, no_wrap=True, min_width=max(len(name), *(len(row[i]) for row in cells)))
    for row in cells:
        made.add_row(*row)
    return made
