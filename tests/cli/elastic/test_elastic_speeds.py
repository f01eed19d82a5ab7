"""A node leaves by a preemption notice, and the next plan deals the units by the measured speeds of those who stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import BIN, TINY, Started, in_ranks, losses, rows, write_job
from tests.processes.ranks import free_port

STEPS, UNITS, SLOWLY = 36, 8, 4.0
SHAPE: dict[str, Any] = {
    "backend": "replicated", "max_steps": STEPS, "per_device_train_batch_size": 1, "global_batch_size": UNITS,
    "eval_steps": None, "save_steps": None, "workers": 1, "export": False,
}  # fmt: skip


@pytest.mark.timeout(240)
def test_a_slow_node_gets_fewer_units_after_the_next_change(tmp_path: Path, ranks: Callable[[int], Any]) -> None:
    """Node `slow` needs four times as long for a forward. When its notice lets the third node leave, the others are
    planned anew: by speed, since under DDP every rank holds all weights."""
    model = {"import": TINY, "args": {"pause_s": 0.02, "slowly": SLOWLY}}
    elastic = {"endpoint": f"127.0.0.1:{free_port()}", "min_nodes": 2, "address": "127.0.0.1", "lease_s": 3.0}
    job = write_job(tmp_path / "run.yaml", **(SHAPE | {"model": model, "elastic": elastic}))

    def start(name: str) -> Started:
        notice = f"elastic.preemption_notice_file={tmp_path}/{name}-goes"
        train = [str(BIN / "elastic-lsopt"), "train", str(job), notice]
        return Started(["env", f"ELASTIC_LSOPT_NODE={name}", *train], tmp_path)

    nodes = {name: start(name) for name in ("fast", "slow", "third")}
    try:
        nodes["fast"].until(lambda: max(rows(tmp_path / "run"), default=0) >= 8)
        (tmp_path / "third-goes").touch()
        assert [node.wait() for node in nodes.values()] == [0, 0, 0], [node.output for node in nodes.values()]
    finally:
        for node in nodes.values():
            node.kill()
    *_, three, last = read_journal(tmp_path / "run")
    assert sorted(three["after"]["units"]) == [2, 3, 3], three
    assert last["why"].startswith("leaving: third") and last["redone_steps"] == 0 and not last["gone"], last
    assert max(rows(tmp_path / "run")) == STEPS > last["step"]
    units = dict(zip(last["nodes"], last["after"]["units"], strict=True))
    assert units["fast"] + units["slow"] == UNITS and units["slow"] in (1, 2), last
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "undisturbed.yaml", **SHAPE)))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
