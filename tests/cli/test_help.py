"""Help, configuration and reports answer without torch, whose import takes longer than they do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elastic_lsopt as lso

pytestmark = pytest.mark.fast

HEAVY = ("torch", "numpy", "pydantic", "rich", "transformers", "deepspeed", "matplotlib")
COMMANDS = (
    "", "train", "agent", "validate", "plan", "study", "status", "doctor", "runs", "report", "probe", "schema",
    "methods", "compare",
)  # fmt: skip


def imported_by(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of these a fresh interpreter has imported after the code."""
    asked = f"import sys\n{code}\nprint([n for n in {names!r} if n in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stderr.splitlines()[-1])


def test_no_help_imports_more_than_pythons_own_library() -> None:
    ask = (
        "from contextlib import suppress\nfrom elastic_lsopt.cli.main import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    with suppress(SystemExit):\n"
        "        main([*command.split(), '--help'])\n"
        "        raise RuntimeError('no help')\n"
    )
    assert imported_by(ask) == []


def test_every_sub_command_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from elastic_lsopt.cli.main import main

    with pytest.raises(SystemExit):
        main(["--help"])
    assert set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)) == set(COMMANDS[1:])


def test_reading_a_job_or_a_run_needs_no_torch() -> None:
    config = Path(lso.__file__).parent / "config"
    modules = [f"elastic_lsopt.config.{path.stem}" for path in config.glob("*.py") if path.stem != "__init__"]
    code = f"import {', '.join(sorted(modules))}, elastic_lsopt.cli.report, elastic_lsopt.report.write"
    assert imported_by(code, ("torch",)) == []


def test_dir_is_true() -> None:
    """`dir` shows each public name before its first use, and nothing that is not there."""
    for module in (lso, lso.elastic):
        assert set(module.__all__) <= set(dir(module))
        assert all(hasattr(module, name) for name in dir(module))
    assert "probes" in dir(lso)
    with pytest.raises(AttributeError, match="no attribute 'Sam'"):
        lso.Sam  # noqa: B018


def test_type_checkers_see_what_python_finds() -> None:
    tree = ast.parse(Path(lso.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(declared) == sorted(lso.__all__)
    for name, module in declared.items():
        found = getattr(lso, name)
        assert found is getattr(sys.modules[str(module)], name)
