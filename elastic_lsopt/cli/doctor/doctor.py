"""`elastic-lsopt doctor`: is this machine, and are its hosts, ready for a job; what to fix where they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from elastic_lsopt.cli.doctor.files import look_at_files
from elastic_lsopt.cli.doctor.finding import Finding
from elastic_lsopt.cli.doctor.hardware import look_at_hardware
from elastic_lsopt.cli.doctor.network import hosts_of, look_at_hosts, look_at_ports, look_at_store
from elastic_lsopt.cli.doctor.software import look_at_software

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    hostfile: str | None = None
    store: str | None = None
    output_dir: str = "."
    gpu: bool = False
    as_json: bool = False


def doctor(asked: Asked) -> int:
    """Print a line per finding as it comes, or with `as_json` one object; returns 1 where anything failed.

    Raises UserError for a hostfile that cannot be read and a store that is no address.
    """
    hosts = hosts_of(Path(asked.hostfile)) if asked.hostfile is not None else []
    store = look_at_store(asked.store) if asked.store is not None else None
    findings = list[Finding]()
    for finding in _findings(asked, hosts, store):
        findings.append(finding)
        if not asked.as_json:
            _print(finding)
    failed = sum(finding.state == "fail" for finding in findings)
    if asked.as_json:
        print(json.dumps({"ready": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        warned = sum(finding.state == "warn" for finding in findings)
        print(f"{len(findings)} looked at, {warned} to mind, {failed} to fix.")
    return int(failed > 0)


def _findings(asked: Asked, hosts: list[str], store: Finding | None) -> Iterator[Finding]:
    yield from look_at_software()
    yield from look_at_hardware(gpu=asked.gpu)
    yield from look_at_files(Path(asked.output_dir).expanduser())
    yield from look_at_ports()
    if store is not None:
        yield store
    if hosts:
        yield from look_at_hosts(hosts)


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{finding.state:4}", COLOURS[finding.state]), f"  {finding.what}: {finding.found}")
    if finding.fix:
        line.append(f"\n      fix: {finding.fix}")
    Console(soft_wrap=True, highlight=False).print(line)
