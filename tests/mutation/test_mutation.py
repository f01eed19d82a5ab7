"""The tool that asks whether the suite would notice: mistakes that are Python, a repeatable draw, contexts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.contexts import at_import, by_case
from tests.mutation.draw import draw, sources
from tests.mutation.mistakes import mistakes

pytestmark = pytest.mark.fast

TOY = '''"""What < is, 3 + 4."""

import logging

LIMIT = 3


def f(x: int, on: bool = True) -> float:
    """a + b"""
    if x < 2 and on:
        g(x)
    if not on:
        raise ValueError(f"x={x + 1} is less than {LIMIT - 1}")
    x += 1
    logging.info("x - 1")
    return x * 2.0 - LIMIT if x is None else -x  # τ
'''


def test_mistakes_of_a_toy() -> None:
    afters = {m.after.strip() for m in mistakes(TOY)}
    assert afters == {
        "if x <= 2 and on:", "if x < 3 and on:", "if x < 2 or on:", "if not (x < 2 and on):", "pass",
        "if on:", "if not (not on):",
        "x -= 1", "x += 2",
        "return x / 2.0 - LIMIT if x is None else -x  # τ", "return x * 4.0 - LIMIT if x is None else -x  # τ",
        "return x * 2.0 + LIMIT if x is None else -x  # τ", "return x * 2.0 - LIMIT if x is not None else -x  # τ",
        "return x * 2.0 - LIMIT if x is None else x  # τ",
    }  # fmt: skip


def test_a_place_behind_wide_letters() -> None:
    [found] = mistakes("def f():\n    τ = 'é' if a < b else 'ü'\n")
    assert found.after == "    τ = 'é' if a <= b else 'ü'"


def test_each_mistake_of_the_package_is_one_line_of_python() -> None:
    text = sources()["elastic_lsopt/space/layout.py"]
    lines = text.splitlines()
    found = mistakes(text)
    assert len(found) > 20
    for m in found:
        assert lines[m.line - 1] == m.before != m.after and m.statement <= m.line
        ast.parse("\n".join([*lines[: m.line - 1], m.after, *lines[m.line :]]))


def test_what_runs_at_import() -> None:
    text = "@cached\ndef f(\n    x=3,\n):\n    return x\n\n\nclass A:\n    rho = 0.5\n\n    def g(self):\n        0\n"
    assert [n for n in range(1, 12) if at_import(text, n)] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_a_draw_is_the_seeds_and_keeps_what_still_stands() -> None:
    texts = {f"elastic_lsopt/space/{name}.py": TOY for name in ("a", "b", "c")}
    drawn = draw(texts, 0, 4, packages=["space"])
    assert (
        drawn == draw(dict(reversed(texts.items())), 0, 4, packages=["space"]) != draw(texts, 1, 4, packages=["space"])
    )
    assert len({(m.path, m.before) for m in drawn}) == 4
    first = drawn[0]
    changed = texts | {first.path: TOY.replace(first.before, "# gone")}
    again = draw(changed, 0, 4, drawn, packages=["space"])
    assert len(again) == 4 and first not in again and set(drawn[1:]) <= {*again}
    assert all(m.line_in(changed[m.path]) for m in again)


def test_a_case_belongs_to_the_tests_that_name_it(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        'KIND = "tests.cases.x:one"\n\ndef test_b(\n    ranks,\n) -> None:\n    ranks(2).run("tests.cases.x:two")\n'
    )
    of = by_case(tmp_path)
    name = f"{tmp_path.name}/test_a.py"
    assert of == {"tests.cases.x:one": {name}, "tests.cases.x:two": {f"{name}::test_b"}}
    (tmp_path / "test_a.py").write_text(
        'CASES = "tests.cases.x:"\n\ndef test_c(ranks) -> None:\n    ranks(2).run(CASES + "three", kind=1)\n'
    )
    assert by_case(tmp_path) == {"tests.cases.x:three": {f"{name}::test_c"}}
    assert any(t.startswith("tests/oracle/test_dropout.py") for t in by_case()["tests.cases.dropout:dropout"])
