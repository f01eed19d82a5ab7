"""The elastic runtime for a loop of one's own: `lso.elastic.run(build, …)`, what `build(world)` returns, the journal.

Imported where it is used: torch loads our rendezvous handler from this package while it imports its own checkpoints,
and must not meet ours half imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lsopt.elastic.agent.roles import run
    from elastic_lsopt.elastic.worker.job import Job
    from elastic_lsopt.elastic.worker.journal import Change, read_journal
    from elastic_lsopt.schedules.batch_scaling import Hyperparameters
    from elastic_lsopt.world import World

__all__ = ["Change", "Hyperparameters", "Job", "World", "read_journal", "run"]
_HOMES = {
    "Change": "elastic_lsopt.elastic.worker.journal",
    "Hyperparameters": "elastic_lsopt.schedules.batch_scaling",
    "Job": "elastic_lsopt.elastic.worker.job",
    "World": "elastic_lsopt.world",
    "read_journal": "elastic_lsopt.elastic.worker.journal",
    "run": "elastic_lsopt.elastic.agent.roles",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
