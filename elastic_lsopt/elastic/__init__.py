"""The elastic runtime for a user's own loop: `lso.elastic.run(build, …)` and what `build(world)` returns.

Imported where it is used: torch loads our rendezvous handler from this package while it imports its own checkpoints,
and must not meet ours half imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lsopt.elastic.job import Job
    from elastic_lsopt.elastic.roles import run
    from elastic_lsopt.elastic.world import World
    from elastic_lsopt.schedules.batch_scaling import Hyperparameters

__all__ = ["Hyperparameters", "Job", "World", "run"]
_HOMES = {
    "Hyperparameters": "elastic_lsopt.schedules.batch_scaling",
    "Job": "elastic_lsopt.elastic.job",
    "World": "elastic_lsopt.elastic.world",
    "run": "elastic_lsopt.elastic.roles",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
