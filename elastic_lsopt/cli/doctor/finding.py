"""What one look at the machine has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: what was looked at, how it is, what there is, and what to do where it is not well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def ok(what: str, found: str) -> Finding:
    return Finding(what, "ok", found)


def warn(what: str, found: str, fix: str) -> Finding:
    return Finding(what, "warn", found, fix)


def fail(what: str, found: str, fix: str) -> Finding:
    return Finding(what, "fail", found, fix)
