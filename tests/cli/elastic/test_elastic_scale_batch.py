"""A living job whose batch follows its world and whose rate follows the batch, over a ramp: DeepSpeed ZeRO-1, SGD."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import BIN, TINY, Started, rows, write_job
from tests.processes.ranks import free_port

UNIT, WORKERS, LR, RAMP = 2, 2, 0.1, 40
BATCH = 2 * UNIT * WORKERS
"""Two units a worker."""
SHAPE: dict[str, Any] = {
    "backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 1}}, "max_steps": 60, "workers": 1,
    "global_batch_size": BATCH, "per_device_train_batch_size": UNIT, "learning_rate": LR, "warmup_ratio": 0.0,
    "lr_scheduler_type": "constant", "eval_steps": None, "save_steps": None, "export": False,
}  # fmt: skip


@pytest.mark.timeout(240)
def test_the_rate_follows_the_batch(tmp_path: Path) -> None:
    elastic = {
        "endpoint": f"127.0.0.1:{free_port()}", "address": "127.0.0.1", "min_nodes": 1, "lease_s": 3.0,
        "policy": "scale_batch", "lr_rule": "linear", "reference_workers": WORKERS, "ramp_samples": RAMP,
    }  # fmt: skip
    slow = {"import": TINY, "args": {"pause_s": 0.03}}
    job = write_job(tmp_path / "run.yaml", **SHAPE, model=slow, elastic=elastic)

    def start(name: str) -> Started:
        return Started(["env", f"ELASTIC_LSOPT_NODE={name}", str(BIN / "elastic-lsopt"), "train", str(job)], tmp_path)

    nodes = [start("n1"), start("n2")]
    try:
        run = tmp_path / "run"
        nodes[0].until(lambda: sum(row["world"] == WORKERS for row in rows(run).values()) >= 20)
        nodes[1].process.send_signal(signal.SIGTERM)
        assert [node.wait() for node in nodes] == [0, 0], [node.output for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    found = sorted(rows(run).items())
    start_of, rate = {}, {}  # of each stretch with one world: where its ramp began, from which rate
    for before, (_, row) in zip([None, *[r for _, r in found]], found, strict=False):
        assert row["batch"] == BATCH * row["world"] // WORKERS
        if before is None or before["world"] != row["world"]:
            start_of[row["world"]] = row["samples"] - row["batch"]
            rate[row["world"]] = LR * row["world"] / WORKERS if before is None else before["lr"]
        target, done = LR * row["world"] / WORKERS, row["samples"] - row["batch"] - start_of[row["world"]]
        share = min(1.0, done / RAMP)
        assert row["lr"] == pytest.approx(rate[row["world"]] + share * (target - rate[row["world"]])), row
    assert found[-1][1]["world"] == 1 and found[-1][1]["lr"] == pytest.approx(LR / 2)
    left = read_journal(run)[-1]
    assert left["why"].startswith("leaving: n2") and not left["gone"]
    assert left["redone_steps"] == 0 and left["source"] == "memory"
    assert (left["before"]["global_batch_size"], left["after"]["global_batch_size"]) == (BATCH, BATCH // 2)
    assert (left["before"]["learning_rate"], left["after"]["learning_rate"]) == (LR, LR / 2)
    assert left["before"]["momentum"] == left["after"]["momentum"] == 0.9
