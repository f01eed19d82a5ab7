"""What a worker has through all generations, and what those who form one agree on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_lsopt.backends.fabric import Fabric
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.memory.reshard import Chosen
from elastic_lsopt.elastic.memory.versions import HostVersions
from elastic_lsopt.elastic.worker.job import Run
from elastic_lsopt.elastic.worker.journal import Journal
from elastic_lsopt.elastic.worker.link import WorkerLink
from elastic_lsopt.elastic.worker.roll import Roll
from elastic_lsopt.elastic.worker.same_data import SameData
from elastic_lsopt.plan import Plan, Policy
from elastic_lsopt.world import World

Build = Callable[[World], Run]
SPEEDS = 16
"""Steps whose median speed is a worker's."""


class Interrupted(Exception):
    """A newer generation has come while this one was being formed."""


@dataclass
class Life:
    """What a worker has through all generations."""

    build: Build
    settings: ElasticConfig
    policy: Policy
    journal: Journal
    link: WorkerLink
    versions: HostVersions = field(default_factory=HostVersions)
    same_data: SameData = field(default_factory=SameData)
    job: str = ""
    """Lives on as long as one worker that has been in it."""
    seen: int = 0
    """The last step that this process has finished, committed or not."""
    unexplained: int = 0
    """Generations in a row that broke here though nobody had gone, and made no step."""
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=SPEEDS))
    """Samples per second of this worker's own forwards, in its last steps."""
    replica: int = 0
    """Of which `versions` are."""

    @property
    def timeout(self) -> timedelta:
        """Of a collective: a peer that is merely slow must not be taken for a dead one."""
        return timedelta(seconds=10 * self.settings.hang_timeout_s)


@dataclass(frozen=True)
class Formed:
    """A rank of a group; `group` talks on the host, whatever the device is."""

    world: World
    fabric: Fabric
    group: dist.ProcessGroup
    roll: Roll | None = None
    """The other replicas' words; None in a job of one."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks have decided alike from what each holds."""

    inventories: list[Any]
    chosen: Chosen | None
    """The moment to go on from; None: the newest checkpoint, or the beginning."""
    plan: Plan
    before: Plan | None
    job: str
    newcomer: bool = False
    """A replica that holds nothing yet of what the others have come to."""

    def world(self, formed: Formed) -> World:
        """What a run is built for."""
        return replace(formed.world, plan=self.plan, job=self.job, newcomer=self.newcomer)
