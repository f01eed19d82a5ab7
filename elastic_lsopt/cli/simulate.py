"""`elastic-lsopt plan FILE.yaml --simulate`: goodput of three modes on many replicas, under failures.

Options say what a step, an exchange, a failure cost; what the file says (tau and the deadline of its `consensus:`, how
many workers it starts, the lease of its `elastic:`) stands where no option does. Needs neither a model nor data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_lsopt.errors import UserError
from elastic_lsopt.simulation.scenario import MOST, SETTINGS, Scenario, check

if TYPE_CHECKING:
    from elastic_lsopt.config.settings import TrainConfig
    from elastic_lsopt.simulation.outcome import Outcome

SIZES = (8, 100, 1000, 10_000, 100_000)
OWN = ("replicas", "trace", "plot")
OF_THE_PLAN = ("worlds", "gpu_memory", "tokens_per_second", "price_per_hour")
PICTURES = (".png", ".svg", ".pdf")
DAY_S = 86_400.0
BAR = 40
"""Characters of a goodput of 1."""


def simulation_options(command: argparse.ArgumentParser) -> None:
    """The options of `--simulate`; none has a default here, so that one that was given is known."""
    command.add_argument(
        "--simulate", action="store_true", help="in place of a plan: goodput of three modes under failures"
    )
    more = command.add_argument_group("with --simulate")
    sizes = ",".join(map(str, SIZES))
    more.add_argument("--replicas", metavar="N,N,…", help=f"numbers of replicas (default: the file's, else {sizes})")
    for name, setting in SETTINGS.items():
        if name in OWN:
            continue
        said = setting.metadata["said"]
        if setting.type == "bool":
            more.add_argument(flag(name), action="store_true", default=None, help=said)
            continue
        default = DEFAULTS.get(name, f"{setting.default:g}" if setting.type != "str" else setting.default)
        more.add_argument(flag(name), metavar=setting.metadata["unit"], help=f"{said} (default: {default})")
    more.add_argument("--trace", metavar="FILE", help="outages that have happened: CSV of replica,down_s,up_s")
    more.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf")


DEFAULTS = {
    "gpus": "the file's workers per replica", "tau": "the file's, else 32", "timeout_s": "the file's, else 30",
    "steps": "the file's, else by_size",
    "notice_s": "two leases of an elastic file, else inf", "mtbf_h": "8766, a year",
}  # fmt: skip


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def refuse_without_simulate(arguments: argparse.Namespace) -> None:
    """UserError for an option that only `--simulate` reads."""
    for name in (*SETTINGS, *OWN):
        if getattr(arguments, name) is not None:
            raise UserError(f"{flag(name)} needs --simulate.")


def simulate(path: str, overrides: Sequence[str], arguments: argparse.Namespace) -> int:
    """Print the simulation, or one JSON object; returns 0. Raises UserError, one line, for whatever is wrong."""
    from elastic_lsopt.cli.job_file import read_job
    from elastic_lsopt.simulation.compare import compare
    from elastic_lsopt.simulation.trace import read_trace

    for name in OF_THE_PLAN:
        if getattr(arguments, name) is not None:
            raise UserError(f"{flag(name)} is of the plan: leave it out with --simulate.")
    given = {name: _value(name, getattr(arguments, name)) for name in SETTINGS if name not in OWN}
    given = {name: value for name, value in given.items() if value is not None}
    sizes, target = _sizes(arguments.replicas), _target(arguments.plot)
    if arguments.trace is not None and "mtbf_h" in given:
        raise UserError("--trace tells the failures: leave --mtbf-h out.")
    file = _of_file(read_job(path, overrides, imports=False).config)
    sizes = sizes or [*dict.fromkeys([file.pop("replicas", SIZES[0]), *SIZES[1:]])]
    scenario = [_scenario(file | given, size) for size in sizes][-1]
    trace = None
    if arguments.trace is not None:
        trace = read_trace(arguments.trace, min(sizes))
        if "days" not in given and len(trace):
            scenario = replace(scenario, days=(float(trace.up_s.max()) + scenario.restart_s) / DAY_S)
    told = compare(scenario, sizes, trace)
    failures = "failures of a trace" if trace is not None else _said_of_failures(scenario)
    if target is not None:
        from elastic_lsopt.simulation.draw import draw

        draw(told, target, f"{_gpus(scenario)} per replica, {failures}")
    if arguments.json:
        print(json.dumps(_as_json(path, scenario, told), indent=2))
        return 0
    _print(path, scenario, told, failures)
    if target is not None:
        print(f"drawn in {target}")
    return 0


# -- what is asked -----------------------------------------------------------------------------------------------------


def _value(name: str, text: Any) -> Any:
    """An option's value as its setting takes it; None where it was not given."""
    kind = SETTINGS[name].type
    if text is None or kind == "bool":
        return text
    value = text
    if kind != "str":
        try:
            value = int(text) if kind == "int" else float(text)
        except ValueError:
            value = math.nan
    check(name, value, f"{flag(name)} {text}")
    return value


def _sizes(text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"\d+(,\d+)*", text) or not all(0 < int(n) <= MOST for n in text.split(",")):
        raise UserError(f"--replicas {text} must be numbers of replicas from 1 to {MOST:,}, such as 8,100,1000.")
    return sorted({int(n) for n in text.split(",")})


def _target(text: str | None) -> Path | None:
    if text is None:
        return None
    target = Path(text)
    if target.suffix.lower() not in PICTURES:
        raise UserError(f"--plot {text} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    if not target.parent.is_dir():
        raise UserError(f"--plot {text}: there is no folder {target.parent}; make it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'elastic_lsopt[train]'.")
    return target


def _of_file(config: TrainConfig) -> dict[str, Any]:
    """What the job's file says of a simulation's settings."""
    from elastic_lsopt.config.consensus import read_consensus
    from elastic_lsopt.consensus import registry

    found: dict[str, Any] = {"gpus": config.workers}
    if config.consensus is not None:
        block = read_consensus(config.consensus)
        found |= {"replicas": block.replicas, "timeout_s": block.exchange_timeout_s, "steps": block.steps}
        found["gpus"] = max(1, config.workers // block.replicas)
        if "tau" in block.hyperparameters or ":" not in block.rule:  # one of the user's own is not imported here
            found["tau"] = block.hyperparameters.get("tau") or registry.build(block.rule, **block.hyperparameters).tau
    if config.elastic is not None:
        found["notice_s"] = 2 * config.elastic.lease_s
    return found


def _scenario(values: Mapping[str, Any], size: int) -> Scenario:
    try:
        return Scenario(**{**values, "replicas": size})
    except UserError as error:
        named = re.sub(rf"\b({'|'.join(SETTINGS)})\b", lambda found: flag(found[0]), str(error))
        raise UserError(named) from None


# -- what is said ------------------------------------------------------------------------------------------------------


def _print(path: str, scenario: Scenario, told: Sequence[Sequence[Outcome]], failures: str) -> None:
    from elastic_lsopt.cli.terminal.tables import console_of_tables, table
    from elastic_lsopt.simulation.draw import LOSSES

    console = console_of_tables()
    console.print(f"{path}: replicas of {_gpus(scenario)}, {scenario.days:g} days simulated, {failures}")
    console.print(_said(scenario), markup=False)
    modes = [outcome.mode for outcome in told[0]]
    shown = table(console, "Goodput, %", ["replicas", "failures", *modes])
    for outcomes in told:
        shown.add_row(
            f"{outcomes[0].replicas:,}", f"{outcomes[0].failures:,}", *(f"{100 * o.goodput:.1f}" for o in outcomes)
        )
    console.print(shown)
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    for outcomes in told:
        for number, outcome in enumerate(outcomes):
            name = f"{outcome.replicas:,}" if number == 0 else ""
            filled = block * int(BAR * outcome.goodput)
            console.print(f"{name:>9} {outcome.mode:12} {filled:{BAR}} {100 * outcome.goodput:5.1f}", markup=False)
    title = f"What the rest went to, % of the time of {told[-1][0].replicas:,} replicas"
    rest = table(console, title, ["mode", *(said for said, _ in LOSSES.values()), "steps lost"])
    for outcome in told[-1]:
        shares = (f"{max(0.0, 100 * outcome.losses[name]):.2f}" for name in LOSSES)
        rest.add_row(outcome.mode, *shares, f"{outcome.lost_steps:,.0f}")
    console.print(rest)


def _gpus(s: Scenario) -> str:
    return "1 GPU" if s.gpus == 1 else f"{s.gpus:,} GPUs"


def _said(s: Scenario) -> str:
    varies = "exponential" if s.step_times == "exponential" else f"± {100 * s.spread:g} %"
    known = "at the deadline only" if math.isinf(s.notice_s) else f"after {s.notice_s:g} s"
    slow = f", {100 * s.slow_share:g} % of the replicas {s.slow_factor:g} times as slow" if s.slow else ""
    return (
        f"A step takes {s.step_s:g} s ({varies}){slow}, an exchange {s.exchange_s:g} s; consensus: tau {s.tau}, "
        f"deadline {s.timeout_s:g} s, a loss is known {known}; elastic: {s.reform_s:g} s to form anew, {s.join_s:g} s "
        f"to take one in; synchronous: {s.checkpoint_s:g} s per checkpoint; {s.replace_s:g} s for a replacement, "
        f"{s.restart_s:g} s to restart."
    )


def _said_of_failures(s: Scenario) -> str:
    return "no failures" if math.isinf(s.mtbf_h) else f"a failure per GPU in {s.mtbf_h:,g} h"


def _as_json(path: str, scenario: Scenario, told: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    settings = {k: None if v == math.inf else v for k, v in vars(scenario).items() if k != "replicas"}
    return {"file": path, "settings": settings, "outcomes": [vars(o) for outcomes in told for o in outcomes]}
