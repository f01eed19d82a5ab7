"""The elastic runtime: `lso.elastic.run(build, config)` and what `build` returns."""

from elastic_lsopt.elastic.job import Job
from elastic_lsopt.elastic.roles import run
from elastic_lsopt.elastic.world import World

__all__ = ["Job", "World", "run"]
