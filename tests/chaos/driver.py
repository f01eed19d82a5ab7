"""A seeded driver: events at living jobs, and after each the laws of the elastic runtime (`check`).

    python -m tests.chaos.driver --backend zero3 --events 200 --seed 7 --results FILE.jsonl       # make chaos

A round is one job of 3 to 5 nodes and about 20 events; rounds go on until the backend has had its events. An event
comes as soon as QUORUM nodes train together, so the others' starts are under way when it hits. RESULTS holds a line an
event, so an interrupted run goes on where it was; a failure is a line with its seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit
from elastic_lsopt.data.order import SampleOrder
from tests.chaos.cluster import Cluster, Row, Stuck
from tests.chaos.job import BATCH, SAMPLES

POINTS = (
    "forward", "backward", "perturbed", "all-reduce", "mirroring", "resharding", "committing", "saving", "recovery",
)  # fmt: skip
ELASTIC = {
    "lease_s": 1.5, "hang_timeout_s": 4.0, "max_respawns": 1000, "copies": 2, "join_debounce_s": 0.2, "max_nodes": 5,
}  # fmt: skip
NODES, QUORUM = 4, 3
"""Nodes that are kept running, and those that train together before the next event: a majority of them survives it."""
RECOVER_S = 45.0
"""Longest time from an event to two further steps: a hung worker (4 s), an eviction (3 s), a new worker's start."""
START_S = 90.0
"""Longest time until new nodes' workers take part: they import torch and DeepSpeed."""
FINISH_S = 90.0
ORPHANS_S = 20.0
"""An agent does not wait for the workers that it kills."""


@cache
def undisturbed(steps: int) -> list[float]:
    """The loss at each step of one process that nobody disturbs."""
    import torch.distributed as dist

    from tests.chaos.job import UNIT, Rows, collate, engine_of

    torch.set_num_threads(1)
    assert not dist.is_initialized()
    from elastic_lsopt.data.loader import StepLoader

    engine = engine_of("plain", 16, steps * BATCH)
    loader = StepLoader(
        Rows(),
        collate,
        global_batch_size=BATCH,
        microbatch_size=UNIT,
        seed=1,
        rank=0,
        world=1,
        total_samples=steps * BATCH,
    )
    return [engine.train_batch(units) for units in loader]


@dataclass
class Event:
    """What was done, and how long it took until two further steps were finished."""

    what: str
    seconds: float


def events_of(draw: random.Random) -> str:
    """The next event: named points half of the time."""
    plain = ("kill", "kill", "term-worker", "term-node", "stop", "join", "agent-kill", "host-kill", "two", "twice")
    if draw.random() < 0.5:
        return f"at-{draw.choice(POINTS)}"
    return draw.choice(plain)


class Round:
    """One job from its start to its end, with `count` events drawn from `seed`."""

    def __init__(self, backend: str, seed: int, count: int, folder: Path, note: Callable[[Event], None]) -> None:
        self.draw, self.count, self.note = random.Random(f"{backend}/{seed}"), count, note
        self.steps = 60 + 20 * count
        self.cluster = Cluster(folder, backend=backend, steps=self.steps, slow_s=0.5, **ELASTIC)

    def run(self) -> None:
        """Raises AssertionError (Stuck, for time limits) where a law is broken."""
        with self.cluster as cluster:
            for _ in range(NODES):
                cluster.start()
            self._whole()
            for _ in range(self.count):
                if cluster.progress()[1] >= self.steps - 20:
                    break
                what = events_of(self.draw)
                start = time.monotonic()
                self._do(what)
                self._goes_on(what)
                self.note(Event(what, time.monotonic() - start))
                self._whole()
            cluster.hurry()
            cluster.until(lambda: not cluster.living(), "the end of the job", FINISH_S + self.steps * 0.03)
            cluster.until(lambda: not cluster.workers(), "no orphans", ORPHANS_S)
            check(cluster.rows(), self.steps, cluster.logs)

    def _do(self, what: str) -> None:
        cluster, draw = self.cluster, self.draw
        workers = sorted(cluster.workers().items())
        nodes = [cluster.nodes[name] for name in cluster.living()]
        match what:
            case "kill":
                cluster.kill(draw.choice(workers)[1])
            case "term-worker":
                cluster.kill(draw.choice(workers)[1], signal.SIGTERM)
            case "term-node":
                cluster.kill(draw.choice(nodes).pid, signal.SIGTERM)
            case "stop":
                cluster.kill(draw.choice(workers)[1], signal.SIGSTOP)
            case "join":
                if len(nodes) < NODES + 1:
                    cluster.start()
            case "agent-kill":
                cluster.kill(draw.choice(nodes).pid)
            case "host-kill":
                if (host := cluster.host()) in cluster.nodes:
                    cluster.kill(cluster.nodes[host].pid)  # type: ignore[index]
            case "two":
                for _, pid in draw.sample(workers, min(2, len(workers) - 1)):
                    cluster.kill(pid)
            case "twice":  # a second failure in the recovery from the first
                cluster.order(draw.choice(("recovery", "resharding")), signal.SIGKILL)
                cluster.kill(draw.choice(workers)[1])
            case _:
                point = what.removeprefix("at-")
                cluster.order(point, draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
                if point in ("resharding", "recovery"):  # only a change of members gets there
                    cluster.kill(draw.choice(workers)[1])

    def _goes_on(self, what: str) -> None:
        """The order (if any) is taken, and the job makes two more steps."""
        cluster = self.cluster
        if what.startswith("at-"):
            point = what.removeprefix("at-")
            cluster.until(lambda: cluster.taken(point), f"{what}: nobody got there", RECOVER_S)
        time.sleep(0.2)
        before = cluster.progress()[1]
        done = min(before + 2, self.steps)
        cluster.until(lambda: cluster.progress()[1] >= done, f"{what}: further steps", RECOVER_S)

    def _whole(self) -> None:
        """NODES nodes live, QUORUM of them train in one generation, and nobody votes in it who is dead: the next event
        finds a quorum that bears it."""
        cluster = self.cluster

        def whole() -> bool:
            while len(cluster.living()) < NODES:  # also one that was still leaving a moment ago
                cluster.start()
            generation, step = cluster.progress()
            change = next((c for c in reversed(cluster.changes()) if c["generation"] == generation), None)
            trains = {*change["nodes"]} if change is not None else set()
            living = {*cluster.living()}
            return step >= self.steps or (len(trains & living) >= QUORUM and cluster.voters() <= living)

        cluster.until(whole, "a quorum in one generation", START_S)


def check(rows: list[Row], steps: int, logs: Callable[[], str]) -> None:
    """Law 5: the loss at every step is the undisturbed run's, every sample is committed exactly once, and replicas of
    the weights are the same to the bit."""
    expected = undisturbed(steps)
    order = SampleOrder(SAMPLES, 1)
    by_attempt: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_attempt.setdefault((row["step"], row["generation"]), []).append(row)
    done = {step for step, _ in by_attempt}
    assert done == set(range(1, steps + 1)), f"steps without a trace: {sorted(set(range(1, steps + 1)) - done)[:9]}"
    for (step, generation), attempt in sorted(by_attempt.items()):
        for row in attempt:
            assert abs(row["loss"] - expected[step - 1]) <= 1e-5 * abs(expected[step - 1]), (
                f"step {step} in generation {generation}, rank {row['rank']} of {row['world']}: loss {row['loss']}, "
                f"undisturbed {expected[step - 1]}\n{logs()}"
            )
            assert row["samples"] == step * BATCH
        assert len({row.get("weights") for row in attempt}) == 1, f"step {step}: replicas differ: {attempt}"
        ids = [i for row in attempt for i in row["ids"]]
        wanted = order.at(range((step - 1) * BATCH, step * BATCH)).tolist()
        assert len(ids) == len(set(ids)) and set(ids) <= set(wanted), f"step {step}: ran {ids}, its samples {wanted}"
        if len(attempt) == attempt[0]["world"]:  # nobody died before he could write it down
            assert sorted(ids) == sorted(wanted), f"step {step}: ran {ids}, its samples {wanted}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("fsdp2", "ddp", "zero0", "zero1", "zero2", "zero3"), required=True)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--round", type=int, default=20, help="events a job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.touch()
    past = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    mine = [line for line in past if line["backend"] == arguments.backend]
    ended = {line["seed"] for line in mine if "event" not in line}  # a round that was interrupted was not checked
    done = len([line for line in mine if "event" in line and line["seed"] in ended])
    seed = max([arguments.seed - 1, *(line["seed"] for line in mine)]) + 1
    failures = 0
    while done < arguments.events:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        lines = Lines(arguments.results, arguments.backend, seed)
        try:
            Round(arguments.backend, seed, arguments.round, folder / "run", lines.event).run()
        except (AssertionError, OSError) as error:
            failures += 1
            kept = folder.with_name(f"failed-{arguments.backend}-{seed}")
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            kind = "stuck" if isinstance(error, Stuck) else "broken"
            lines.write(failure=kind, why=str(error).splitlines()[0][:500], commit=commit())
            print(
                f"FAILED seed {seed} after {lines.events} events, kept in {kept}:\n{error}", file=sys.stderr, flush=True
            )
        else:
            lines.write(round="passed", events=lines.events, commit=commit())
            shutil.rmtree(folder, ignore_errors=True)
        done += lines.events
        seed += 1
    return 1 if failures else 0


class Lines:
    """What one round adds to RESULTS."""

    def __init__(self, path: Path, backend: str, seed: int) -> None:
        self._path, self._head, self.events = path, {"backend": backend, "seed": seed}, 0

    def write(self, **line: Any) -> None:
        with self._path.open("a") as out:
            out.write(json.dumps({**self._head, **line}) + "\n")

    def event(self, event: Event) -> None:
        self.events += 1
        self.write(event=event.what, seconds=round(event.seconds, 3))
        print(*self._head.values(), f"{self.events}: {event.what} {event.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
