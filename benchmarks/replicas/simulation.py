"""The simulation of many replicas (elastic_lsopt/simulation) beside runs of 2 to 4, and how long 100,000 take.

Real replicas are killed at seeded times and started again. The simulation is told the same outages, and what a step,
its spread and an exchange took in that run. Compared are the time until as many steps have counted, and the steps lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.machine import ROOT
from elastic_lsopt.simulation.compare import compare
from elastic_lsopt.simulation.consensus import consensus
from elastic_lsopt.simulation.outages import Outages
from elastic_lsopt.simulation.scenario import Scenario

STEP_S, TAU, TIMEOUT_S = 0.05, 20, 3.0
SECONDS, BETWEEN_KILLS_S, AWAY_S, LIMIT_S = 90.0, 15.0, 1.0, 120.0
Popen = subprocess.Popen
SIZES = (8, 1000, 100_000)
DAY_S = 86_400.0
Line = dict[str, Any]


@dataclass
class Run:
    """What each life of each replica has said, and when which was killed; times from the job's begin."""

    lines: dict[tuple[int, int], list[Line]]
    kills: list[tuple[int, int, float]]
    """(replica, life, when)."""

    def meetings(self) -> dict[int, list[Line]]:
        """The members' lines of each meeting."""
        found: dict[int, list[Line]] = {}
        for said in self.lines.values():
            for line in said:
                if "met" in line:
                    found.setdefault(line["met"], []).append(line)
        return found

    def counted(self) -> list[tuple[float, int]]:
        """When each meeting that went well was over, and how many steps of all had counted by then."""
        out, steps = [], 0
        for _, lines in sorted(self.meetings().items()):
            if any(line["well"] for line in lines):
                steps += sum(line["counted"] for line in lines)
                out.append((max(line["at"] for line in lines), steps))
        return out

    def lost(self) -> int:
        """Steps that replicas had taken when they were killed and no exchange had counted."""
        steps = 0
        for replica, life, _ in self.kills:
            said = self.lines[replica, life]
            last = max((i for i, line in enumerate(said) if line.get("well")), default=-1)
            steps += sum("step" in line for line in said[last + 1 :])
        return steps

    def outages(self) -> Outages:
        """From each kill until the next life says that it is there."""
        rows = []
        for replica, life, at_s in self.kills:
            there = [line["at"] for line in self.lines.get((replica, life + 1), []) if "there" in line]
            rows.append((replica, at_s, there[0] if there else 1e9))
        replica, down_s, up_s = zip(*rows, strict=True) if rows else ((), (), ())
        return Outages(np.array(replica, int), np.array(down_s), np.array(up_s), whole=True, traced=True)


def job(replicas: int, seconds: float, *, step_s: float, kills: random.Random) -> Run:
    """So many real replicas for so long, of which one after another is killed and started again."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    begin = 0.0
    lives: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    killed: list[tuple[int, int, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-replicas-") as folder:

        def start(number: int, life: int) -> None:
            order = {
                "number": number, "replicas": replicas, "life": life, "port": store.port, "tau": TAU, "step_s": step_s,
                "timeout_s": TIMEOUT_S,
            }  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
            with (Path(folder) / f"{number}-{life}").open("wb") as out, (Path(folder) / "log").open("ab") as log:
                process = Popen(
                    [sys.executable, "-m", "benchmarks.replicas.replica", json.dumps(order)], cwd=ROOT, stdout=out,
                    stderr=log, env=environment,
                )  # fmt: skip
            lives[number] = life, process

        try:
            for number in range(replicas):
                start(number, 0)
            _wait_for(Path(folder), replicas)
            begin = time.time()
            store.set("begin", "")
            again: list[tuple[float, int]] = []
            next_kill = begin + kills.expovariate(1 / BETWEEN_KILLS_S)
            while (now := time.time()) < begin + seconds:
                for entry in [e for e in again if e[0] <= now]:
                    again.remove(entry)
                    start(entry[1], lives[entry[1]][0] + 1)
                at_work = [n for n in range(replicas) if _steps(Path(folder) / f"{n}-{lives[n][0]}")]
                at_work = [n for n in at_work if n not in {number for _, number in again}]
                if now >= next_kill and len(at_work) > 1:
                    victim = kills.choice(at_work)
                    lives[victim][1].send_signal(signal.SIGKILL)
                    killed.append((victim, lives[victim][0], time.time() - begin))
                    again.append((now + AWAY_S, victim))
                    next_kill = now + kills.expovariate(1 / BETWEEN_KILLS_S)
                time.sleep(0.002)
        finally:
            for _, process in lives.values():
                process.kill()
                process.wait()
        lines = {}
        for file in Path(folder).glob("*-*"):
            number, life = map(int, file.name.split("-"))
            lines[number, life] = _said(file, begin)
        if not any("met" in line for said in lines.values() for line in said):
            raise RuntimeError((Path(folder) / "log").read_text()[-3000:])
        return Run(lines, killed)


def _wait_for(folder: Path, replicas: int) -> None:
    until = time.time() + LIMIT_S
    while sum('"there"' in file.read_text() for file in folder.glob("*-0")) < replicas:
        if time.time() > until:
            raise TimeoutError(f"{replicas} replicas were not there in time\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.1)


def _steps(file: Path) -> bool:
    return file.exists() and b'"step"' in file.read_bytes()


def _said(file: Path, begin: float) -> list[Line]:
    lines = []
    for text in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # the last of one that was killed
            line = json.loads(text)
            line |= {key: line[key] - begin for key in ("at", "came") if key in line}
            lines.append(line)
    return lines


def measured(run: Run) -> dict[str, float]:
    """A step's mean and spread, and the time from the last arrival to the end of an exchange of all."""
    steps = []
    for said in run.lines.values():
        for before, line in pairwise(said):
            if "step" in line:
                steps.append(line["at"] - max(before["at"], 0.0))
    full = [lines for lines in run.meetings().values() if all(line["well"] and line["counted"] for line in lines)]
    exchanges = [max(line["at"] for line in lines) - max(line["came"] for line in lines) for lines in full]
    return {
        "step_s": statistics.mean(steps), "spread": min(0.25, statistics.stdev(steps) / statistics.mean(steps)),
        "exchange_s": statistics.median(exchanges),
    }  # fmt: skip


def beside(replicas: int, seed: int, *, seconds: float, step_s: float = STEP_S) -> dict[str, Any]:
    """Figures of one number of replicas."""
    run = job(replicas, seconds, step_s=step_s, kills=random.Random(seed))
    costs = measured(run)
    seconds, steps = run.counted()[-1]
    scenario = Scenario(
        replicas=replicas, tau=TAU, timeout_s=TIMEOUT_S, restart_s=0.0, days=10 * seconds / DAY_S, **costs
    )
    told = [consensus(replace(scenario, seed=s), run.outages(), until_steps=steps) for s in range(5)]
    kills = sum(at_s < seconds for _, _, at_s in run.kills)
    goodput = steps * costs["step_s"] / (replicas * seconds)
    simulated_s = statistics.mean(t.seconds * steps / t.steps for t in told)  # it ends with a meeting, maybe beyond
    return {
        "kills": kills, "steps": steps, "seconds": seconds, "simulated_seconds": simulated_s,
        "simulated_seconds_off": abs(simulated_s / seconds - 1),
        "goodput": goodput, "simulated_goodput": statistics.mean(t.goodput for t in told), "lost_steps": run.lost(),
        "simulated_lost_steps": statistics.mean(t.lost_steps for t in told), **costs,
    }  # fmt: skip


def scale() -> dict[str, Any]:
    """Seconds that simulating takes, and goodput at a failure per GPU and year (docs/simulation.md)."""
    figures: dict[str, Any] = {}
    for gpus, days in ((1, 10.0), (12, 3.0)):
        scenario = Scenario(gpus=gpus, days=days, notice_s=4.0)
        for size in SIZES:
            begin = time.perf_counter()
            outcomes = compare(scenario, [size])[0]
            figures[f"simulating_{size}_replicas_of_{gpus}_gpus_s"] = round(time.perf_counter() - begin, 2)
            for outcome in outcomes:
                figures[f"goodput_{outcome.mode}_{size}_replicas_of_{gpus}_gpus"] = round(outcome.goodput, 4)
    return figures


def run() -> dict[str, Any]:
    figures = scale()
    for replicas in (2, 3, 4):
        told = beside(replicas, seed=1, seconds=SECONDS)
        figures |= {f"{replicas}_replicas_{name}": value for name, value in told.items()}
    return figures
