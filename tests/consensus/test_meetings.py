"""What a death or a silence at a named point of an exchange costs the others, and that none is averaged by halves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tests.processes.ranks import rank_environment
from tests.processes.warm import ROOT, Popen

DEADLINE_S = 4.0
LIMIT_S, SLACK_S = 60.0, 3.0
"""`SLACK_S`: what a busy machine may add to a step."""


def lives(
    sizes: list[int], victim: int, turns: int = 6, kind: str = "fsdp2", timeout_s: float = DEADLINE_S,
    **order: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each rank's exit code, log and what it said of its turns; a victim that is stopped goes on after the deadline."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    processes = []
    for rank in range(sum(sizes)):
        own = {"rank": rank, "sizes": sizes, "port": store.port, "kind": kind, "turns": turns, "timeout_s": timeout_s}
        own |= order if rank == victim else {}
        processes.append(
            Popen(
                [sys.executable, "-m", "tests.consensus.replica_process", json.dumps(own)], cwd=ROOT,
                env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    if order.get("how") == "stop":
        _wake(processes[victim].pid, asleep_s=timeout_s + 1.0)
    out, end = [], time.monotonic() + LIMIT_S
    for process in processes:
        try:
            said, log = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, log = process.communicate()
            log += f"\nended by the test after {LIMIT_S} s"
        out.append({"code": process.returncode, "log": log, "turns": [json.loads(s) for s in said.splitlines()]})
    return out


def _wake(pid: int, *, asleep_s: float) -> None:
    """Wait until the process has stopped, and so much longer."""
    end = time.monotonic() + LIMIT_S / 2
    while time.monotonic() < end:
        with suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "T":
                time.sleep(asleep_s)
                break
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def logs(out: list[dict[str, Any]]) -> str:
    return "\n".join(f"rank {rank}: code {r['code']}, {r['turns']}\n{r['log'][-2000:]}" for rank, r in enumerate(out))


@pytest.mark.parametrize(
    "point",
    ["decided", "inside", "voted", *(pytest.param(p, marks=pytest.mark.full) for p in ("before", "between", "voting"))],
)
def test_a_death_costs_the_others_once(point: str) -> None:
    """Replica 1 loses a rank in its third meeting; replicas 0 and 2 meet without it from then on. One of them that the
    machine holds up then finds the other again, and takes its last steps alone."""
    out = lives([2, 2, 1], victim=3, turns=20, point=point, at=3, how="kill")
    alive = [out[0], out[1], out[4]]
    for r in alive:
        assert r["code"] == 0 and len(r["turns"]) == 20, logs(out)
        mets = [t["met"] for t in r["turns"] if t["met"]]
        after = [m[1:] for m in mets if m[0] > 2]
        assert mets[1] == [1, [0, 1, 2], True] and [[0, 2], True] in after, logs(out)
        assert all(well and 1 not in members for members, well in after), logs(out)
        assert [m for m in mets if not m[2]] == ([] if point in ("before", "voted") else [[2, [0, 1, 2], False]]), logs(
            out
        )
    assert out[0]["turns"][-1]["at"] == out[1]["turns"][-1]["at"], "a replica is one"
    assert max(t["took_s"] for t in out[0]["turns"]) < DEADLINE_S + SLACK_S, logs(out)


@pytest.mark.parametrize("point", [*(pytest.param(p, marks=pytest.mark.full) for p in ("decided", "inside")), "voting"])
def test_a_whole_replica_that_dies_inside_is_missed_at_once(point: str) -> None:
    """Of one rank, so that nobody says that it is gone: its connections do, also while the others wait for its vote."""
    out = lives([1, 1, 1], victim=1, kind="ddp", point=point, at=3, how="kill", timeout_s=60.0)
    for r in (out[0], out[2]):
        mets = [t["met"] for t in r["turns"] if t["met"]]
        assert r["code"] == 0 and [m for m in mets if not m[2]] == [[2, [0, 1, 2], False]], logs(out)
        assert max(t["took_s"] for t in r["turns"]) < SLACK_S, logs(out)


def test_a_silence_costs_the_deadline_once() -> None:
    """… and who was silent is in again."""
    deadline_s = DEADLINE_S / 2
    out = lives([1, 1, 1], victim=1, turns=60, kind="ddp", timeout_s=deadline_s, point="decided", at=3, how="stop")
    for r in out:
        assert r["code"] == 0, logs(out)
    first = out[0]["turns"]
    mets = [t["met"] for t in first if t["met"]]
    assert [m[1] for m in mets if not m[2]] == [[0, 1, 2]], logs(out)
    assert mets[-1][1:] == [[0, 1, 2], True], logs(out)
    [failed] = [t["took_s"] for t in first if t["met"] and not t["met"][2]]
    assert 0.9 * deadline_s < failed < deadline_s + SLACK_S, logs(out)
