"""What a record of another agent costs an agent that leads: the real path, from its store's queue to the answer there.

A real `Agent` leads a generation of `agents` members; a process of its own plays the other members over real sockets:
each sends signed records, with the report of eight workers, and is answered in the agent's store. `main_us_per_record`
is the processor time of the agent's main thread, its ticks and its status included, for a record and its answer;
`process_us_per_record` that of the whole process, TCPStore's thread too. A job of 1,000 agents with leases of 2 s sends
its leader 4,000 records per second: `main_busy_at_1000_agents` is what they would take of one core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent.agent import Agent
from elastic_lsopt.elastic.agent.lease_clock import lease_now
from elastic_lsopt.elastic.agent.node import Node
from elastic_lsopt.elastic.agent.node_folder import NodeFolder
from elastic_lsopt.elastic.mail.inbox import Opened
from elastic_lsopt.elastic.mail.letter import Letter
from elastic_lsopt.elastic.mail.mailbox import connect
from elastic_lsopt.elastic.membership.generation import Change, Generation, Member
from elastic_lsopt.elastic.membership.quorum import Ballot, Vote
from elastic_lsopt.elastic.membership.record import Heartbeat, Record, Rules
from elastic_lsopt.elastic.membership.state import Campaign, State

SECRET = b"the benchmark's own"
WORKERS, LEASE_S = 8, 2.0
RECORDS_AT_1000_PER_S = 1000 * 8 / LEASE_S
"""A report each eighth of a lease."""


def generation(agents: int, address: str) -> Generation:
    """n0 leads n1, n2, …, each with WORKERS workers."""
    members = tuple(Member(f"n{i}", address, tuple(f"n{i}/{w}" for w in range(WORKERS))) for i in range(agents))
    return Generation(1, 0, "n0", members, "", (), running=True)


class Leader(Agent):
    """An agent that leads `agents` members, counts records and ends after `count` of them."""

    def lead(self, agents: int, count: int) -> None:
        formed, now = generation(agents, self.mailbox.address), lease_now()
        self._generation, self._count, self._heard = formed, count, 0
        self._state = State(
            self.node.rules, "n0", self.mailbox.address, generation=formed, vote=Vote(Ballot(0, "n0")),
            workers=formed.members[0].workers, offered=formed.members[0].workers, lease_until_s=now + 3600.0,
            suspect_from_s=now + 3600.0, last=Change("", "n0", 0, running=True),
            campaign=Campaign(Ballot(0, "n0"), now + 3600.0, quorum_s=now),  # nobody is evicted: all begin at once
        )  # fmt: skip

    def _hear(self, letters: list[Opened]) -> None:
        before, self._heard = self._heard, self._heard + len(letters)
        if before < self._count // 4 <= self._heard:  # connections, caches and the first sight of each are behind
            self._first = before  # these letters are timed too: they may be all that there are
            self.start = time.thread_time(), time.process_time(), time.perf_counter()
        super()._hear(letters)
        if self._heard == self._count:
            self.end = time.thread_time(), time.process_time(), time.perf_counter()
            self._exit_code = 0

    def costs_us(self) -> tuple[float, float, float]:
        """Main thread, process, wall clock; for each record."""
        counted = self._count - self._first
        main, process, wall = ((b - a) / counted * 1e6 for a, b in zip(self.start, self.end, strict=True))
        return main, process, wall


def measure(agents: int, count: int) -> dict[str, float]:
    """The costs of `count` records of `agents` - 1 others."""
    rules = Rules(min_nodes=1, max_nodes=2 * agents, job="j", fingerprint={}, lease_s=LEASE_S)
    with tempfile.TemporaryDirectory() as folder:
        leader = Leader(
            Node(
                folder=NodeFolder(Path(folder), "n0"), rules=rules, settings=ElasticConfig(lease_s=LEASE_S),
                secret=SECRET, endpoint=None, address="127.0.0.1:0", workers=0, command=[], environment={},
            )
        )  # fmt: skip
        leader.lead(agents, count)
        others = [sys.executable, "-m", "benchmarks.elastic.agent", leader.mailbox.address, str(agents), str(count)]
        with subprocess.Popen(others) as playing:
            leader.main()
            playing.kill()
        main, process, wall = leader.costs_us()
    return {
        "main_us_per_record": round(main, 2), "process_us_per_record": round(process, 2),
        "wall_us_per_record": round(wall, 1), "main_busy_at_1000_agents": round(main * RECORDS_AT_1000_PER_S / 1e6, 3),
        "process_busy_at_1000_agents": round(process * RECORDS_AT_1000_PER_S / 1e6, 3),
    }  # fmt: skip


def play(address: str, agents: int, count: int) -> None:
    """All other members, in turns. The letters are made first, so that this process costs the agent little."""
    store = connect(address, timedelta(seconds=30))
    told = {"kind": "heartbeat", "generation": 1, "step": 1200, "samples": 76800, "loss": 2.345678, "seconds": 0.1234}
    letters = []
    members = generation(agents, address).members[1:]
    for sent in range(count):
        member, now = members[sent % len(members)], lease_now()
        record = Record(
            member.name, address, "j", Heartbeat(0, sent, now), answer=False, number=1, vote=Vote(Ballot(0, "n0")),
            workers=member.workers, echo=Heartbeat(0, sent, now),
        )  # fmt: skip
        report: dict[str, Any] = {"workers": {w: told for w in record.workers}, "draining": False, "host": "h"}
        letters.append(Letter(record, report, SECRET).sealed)
    for letter in letters:
        store.queue_push("in", letter)


def run() -> dict[str, float]:
    """Figures at 100 and at 1,000 agents."""
    figures: dict[str, float] = {}
    for agents in (100, 1000):
        # Not more for each than its queue of answers takes: nobody fetches them here.
        figures |= {f"{key}_of_{agents}": value for key, value in measure(agents, 60 * (agents - 1)).items()}
    return figures


if __name__ == "__main__":
    play(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
