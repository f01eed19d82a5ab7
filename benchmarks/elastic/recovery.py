"""Changes of members: seconds from the event to the next step, beside stock torchrun, tuned, on the same job.

Three nodes on this machine, one worker each. Times are the workers' own notes of their finished steps against the
moment at which this process sent the signal: nothing is taken from the runtime's own account but the phases. torchrun's
settings are the fastest that were found.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

SMALL, LARGE = 6_111, 277_000
"""Widths: 110,000 parameters; 60 MB of weights and AdamW's moments."""
SLOW_S = 0.05
REPEATS = 5
LIMIT_S = 120.0
NODES = 3
TUNED = (
    "--monitor-interval=0.1", "--rdzv-backend=c10d", f"--nnodes=1:{NODES}", "--nproc-per-node=1", "--max-restarts=20",
    "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120",
)  # fmt: skip
Row = dict[str, Any]


class Nodes:
    """Agents (or stock torchruns) of one job in `folder`."""

    def __init__(self, folder: Path, *, stock: bool, backend: str, width: int, **more: Any) -> None:
        self.folder, self.stock = folder, stock
        self.port = _free_port()
        settings = {
            "folder": str(folder), "stock": stock, "backend": backend, "width": width, "steps": 10**6,
            "slow_s": SLOW_S, "elastic": {"endpoint": f"127.0.0.1:{self.port}", "max_respawns": 1000}, **more,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        job = ["-m", "benchmarks.elastic.job", str(self.folder / "settings.json")]
        endpoint = f"--rdzv-endpoint=127.0.0.1:{self.port}"
        launcher = ["-m", "torch.distributed.run", *TUNED, endpoint, "--rdzv-id=bench"] if self.stock else []
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONPATH": str(ROOT),
            "ELASTIC_LSOPT_NODE": f"n{len(self.processes)}",
        }  # fmt: skip
        with (self.folder / f"n{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *launcher, *job], cwd=ROOT, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def rows(self) -> list[Row]:
        out = []
        for file in self.folder.glob("steps-*.jsonl"):
            for line in file.read_text().splitlines():
                with suppress(json.JSONDecodeError):
                    out.append(json.loads(line))
        return sorted(out, key=lambda r: r["at"])

    def wait(self, found: Callable[[list[Row]], bool], what: str, limit_s: float = LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while not found(self.rows()):
            if time.monotonic() > end:
                logs = "\n".join((self.folder / f"n{i}.log").read_text()[-1500:] for i in range(len(self.processes)))
                raise TimeoutError(f"{what}: not within {limit_s} s\n{logs}")
            time.sleep(0.05)

    def whole(self, world: int, steps: int = 12) -> None:
        """Until the newest steps are of so many workers."""

        def found(rows: list[Row]) -> bool:
            newest = rows[-steps * world :]
            return len(newest) == steps * world and all(r["world"] == world for r in newest)

        self.wait(found, f"a world of {world}")

    def worker_of(self, node: int) -> int:
        """The pid of the node's worker: a child of its agent."""
        listed = subprocess.run(
            ["pgrep", "-P", str(self.processes[node].pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        pids = {r["pid"] for r in self.rows()}
        return next(int(p) for p in listed if int(p) in pids)

    def end(self) -> None:
        for process in self.processes:
            for pid in [p["pid"] for p in self.rows()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


@contextmanager
def nodes(**options: Any) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="bench-elastic-") as folder:
        made = Nodes(Path(folder), **options)
        try:
            made.start()
            time.sleep(1.5)  # the first binds the endpoint
            for _ in range(NODES - 1):
                made.start()
            made.whole(NODES)
            yield made
        finally:
            made.end()


def after(job: Nodes, moment: float, dead: set[int], world: int | None = None) -> tuple[float, int]:
    """(seconds from `moment` to the first step that survivors have finished in a new group, steps done again)."""
    before = [r for r in job.rows() if r["at"] <= moment]
    reached, generation = max(r["step"] for r in before), max(r["generation"] for r in before)

    def new(rows: list[Row]) -> list[Row]:
        # A stock restart has other processes; ours has another generation in the same ones.
        return [
            r for r in rows
            if r["at"] > moment and r["pid"] not in dead and (world is None or r["world"] == world)
            and (r["pid"] not in {b["pid"] for b in before} if job.stock else r["generation"] > generation)
        ]  # fmt: skip

    job.wait(lambda rows: bool(new(rows)), "the next step")
    first = new(job.rows())[0]
    return first["at"] - moment - SLOW_S, max(0, reached - first["step"] + 1)


def kill_worker(job: Nodes) -> tuple[float, int]:
    pid = job.worker_of(1)
    moment = time.time()
    os.kill(pid, signal.SIGKILL)
    return after(job, moment, {pid})


def kill_node(job: Nodes) -> tuple[float, int]:
    """The last node and its worker at once, as a lost host is; never the one that hosts the store."""
    pid = job.worker_of(len(job.processes) - 1)
    moment = time.time()
    job.processes[-1].kill()
    os.kill(pid, signal.SIGKILL)
    return after(job, moment, {pid})


def pause_of_join(job: Nodes, since: float) -> float:
    """The longest pause of a survivor between two steps around the step in which another worker takes part again."""
    job.whole(NODES, 3)
    rows = [r for r in job.rows() if r["at"] > since]
    pauses = []
    for pid in {r["pid"] for r in rows}:
        mine = [r for r in rows if r["pid"] == pid]
        pauses += [b["at"] - a["at"] for a, b in pairwise(mine) if b["world"] == NODES > a["world"]]
    return max(pauses) - SLOW_S


def run() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    cases = [("fsdp2", SMALL, "small"), ("fsdp2", LARGE, "60mb"), ("zero2", SMALL, "small"), ("zero3", SMALL, "small")]
    for backend, width, size in cases:
        with nodes(stock=False, backend=backend, width=width) as job:
            kills, joins = [], []
            for _ in range(REPEATS):
                moment = time.time()
                kills.append(kill_worker(job))
                joins.append(pause_of_join(job, moment))
                job.whole(NODES)
            name = f"{backend}_{size}"
            _note(figures, f"kill_worker_{name}_s", [s for s, _ in kills])
            figures[f"kill_worker_{name}_steps_done_again"] = max(n for _, n in kills)
            _note(figures, f"join_pause_{name}_s", joins)
            if size == "small" and backend == "fsdp2":
                seconds, again = kill_node(job)
                figures["kill_node_fsdp2_small_s"], figures["kill_node_fsdp2_small_steps_done_again"] = seconds, again
            journal = [json.loads(line) for line in (job.folder / "journal.jsonl").read_text().splitlines()]
            figures[f"phases_{name}_s"] = {k: round(v, 3) for k, v in journal[-1]["seconds"].items()}
    with nodes(stock=True, backend="fsdp2", width=SMALL) as job:
        worker, node = [kill_worker(job)], []
        job.whole(NODES)
        node.append(kill_node(job))
    figures["torchrun_kill_worker_s"], figures["torchrun_kill_worker_steps_done_again"] = worker[0]
    figures["torchrun_kill_node_s"], figures["torchrun_kill_node_steps_done_again"] = node[0]
    ours = figures["kill_worker_fsdp2_small_s"]
    figures["torchrun_kill_node_of_our_kill"] = figures["torchrun_kill_node_s"] / ours
    figures["torchrun_kill_worker_of_our_kill"] = figures["torchrun_kill_worker_s"] / ours
    figures["torchrun_kill_node_of_our_kill_node"] = (
        figures["torchrun_kill_node_s"] / figures["kill_node_fsdp2_small_s"]
    )
    return figures


def _note(figures: dict[str, Any], name: str, values: list[float]) -> None:
    figures[name], figures[f"{name}_spread"] = statistics.median(values), [min(values), max(values)]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
