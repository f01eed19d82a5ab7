"""The elastic runtime for a user's own loop: `lso.elastic.run(build, …)` and what `build(world)` returns."""

from elastic_lsopt.elastic.job import Job
from elastic_lsopt.elastic.roles import run
from elastic_lsopt.elastic.world import World
from elastic_lsopt.schedules.batch_scaling import Hyperparameters

__all__ = ["Hyperparameters", "Job", "World", "run"]
