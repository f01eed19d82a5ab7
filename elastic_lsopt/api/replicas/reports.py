"""What follows from the reports of a meeting's members: the same on all of them, for all have heard the same."""

from __future__ import annotations

from elastic_lsopt.backends.peers.meeting import Met
from elastic_lsopt.data.ledger import Ledger


def keeps(met: Met, member: int) -> bool:
    """Whether a member still has the samples that it takes for its own."""
    return met.common is None or spans(Ledger.from_json(met.common), member) == met.reports[member]["held"]


def final(met: Met) -> bool:
    """Whether a member has come for the model at the end; then all form it."""
    return any(report["final"] for report in met.reports.values())


def fit_of(met: Met) -> tuple[int, ...]:
    """Who has what the job has come to; see [Note: who takes part] in hearing.py."""
    reports, ends = met.reports, final(met)
    return tuple(
        m for m in met.members if keeps(met, m) and reports[m]["fit"] and (reports[m]["final"] or not ends)
    )  # fmt: skip


def trained(met: Met) -> dict[int, int]:
    """On how many samples each member has trained since the last exchange; 0 where others train on them by now."""
    return {m: report["samples"] if keeps(met, m) else 0 for m, report in met.reports.items()}


def ledger_of(met: Met) -> Ledger:
    """The job's, after what vacant replicas and members that have lost theirs had open is given back."""
    ledger = Ledger.from_json(met.common)
    vacant = set.intersection(*({*report["vacant"]} for report in met.reports.values()))
    for member in [*(m for m in met.members if not keeps(met, m)), *sorted(vacant)]:
        ledger = ledger.lost(member)
    return ledger


def spans(ledger: Ledger, replica: int) -> list[list[int]]:
    """What the replica has open, as JSON gives it back."""
    return [[*span] for span in ledger.open.get(replica, ())]
