"""The reference of the command line: `python -m elastic_lsopt.cli.reference` writes `docs/commands.md` anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_lsopt.cli.main import command_line

PAGE = Path(__file__).parents[2] / "docs/commands.md"
HEAD = """\
# The command line

<!-- `make schema` writes this page from the parsers of elastic_lsopt/cli: change a help text there. -->

`elastic-lsopt COMMAND …`, or `python -m elastic_lsopt COMMAND …`. For launchers that take a module, `python -m
elastic_lsopt.train` is `elastic-lsopt train` and `python -m elastic_lsopt.agent` is `elastic-lsopt agent`.
`FILE.yaml` holds the keys of [this reference](keys.md), `key=value` is laid over it.

A command ends with 0; with 2 after a mistake of yours, which it says in one line on stderr; with 1 where it has
failed, or where its answer is no (`plan`, `doctor`); with 130 after Ctrl-C. A job that a signal has stopped ends with
`exit_code_when_stopped`. One that could not write its export, or without an export the checkpoint of its end, ends with
2, and the same command goes on from its last good checkpoint.
"""
EXAMPLES = {
    "train": ("elastic-lsopt train configs/quickstart.yaml landscape.rho=0.1",),
    "agent": ("elastic-lsopt agent configs/elastic-quickstart.yaml elastic.endpoint=node-1:29400",),
    "validate": ("elastic-lsopt validate configs/quickstart.yaml",),
    "plan": (
        "elastic-lsopt plan configs/quickstart.yaml --worlds 2,8,64 --gpu-memory 80GiB",
        "elastic-lsopt plan configs/quickstart.yaml --simulate --replicas 8,1000,100000 --gpus 8",
    ),
    "compare": ("elastic-lsopt compare configs/compare-digits.yaml workers=8 'seeds=[0, 1, 2]'",),
    "study": ("elastic-lsopt study configs/study-digits.yaml workers=8 'grid.seed=[0, 1, 2]'",),
    "methods": ("elastic-lsopt methods", "elastic-lsopt methods sam"),
    "status": ("elastic-lsopt status runs/elastic-quickstart",),
    "report": ("elastic-lsopt report runs/quickstart",),
    "doctor": ("elastic-lsopt doctor --gpu --hostfile launch/hostfile --output-dir /shared/runs",),
    "runs": ("elastic-lsopt runs", "elastic-lsopt runs compare runs/a runs/b"),
    "probe": ("elastic-lsopt probe runs/quickstart --measures lambda_max,trace --set trace.samples=50",),
    "schema": ("elastic-lsopt schema > job.schema.json",),
}


def commands_text() -> str:
    """The text of `docs/commands.md`."""
    # argparse shows what a parser has in no public way but its help, whose form changes with Python's version.
    [commands] = [a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction)]
    return "\n".join([HEAD, *(_command(name, made) for name, made in commands.choices.items())])


def _command(name: str, made: argparse.ArgumentParser) -> str:
    purpose = made.description or ""
    rows = [_row(action) for action in made._actions if action.dest != "help"]
    table = ["| argument | meaning |", "|---|---|", *rows, ""] if rows else []
    parts = [f"## `{name}`", "", f"{purpose[0].upper()}{purpose[1:]}.", "", *table]
    return "\n".join([*parts, "```bash", *EXAMPLES[name], "```", ""])


def _row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    shown = " ".join([*action.option_strings, *([value] if value else [])])
    return f"| `{shown}{' …' if action.nargs == '*' else ''}` | {action.help} |"


if __name__ == "__main__":
    PAGE.write_text(commands_text(), encoding="utf-8")
