"""A node that joins a living job with other files on its own disk leaves in one line; the job goes on as if alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import BIN, TINY, Started, in_ranks, losses, rows, write_job
from tests.processes.ranks import free_port

SHAPE: dict[str, Any] = {
    "max_steps": 400, "eval_steps": None, "save_steps": None, "workers": 1, "export": False,
    "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
}  # fmt: skip


@pytest.mark.timeout(180)
def test_a_newcomer_with_other_data(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    """One letter of one document, changed when the job has read it: path, length and settings are the job's."""
    elastic = {"endpoint": f"127.0.0.1:{free_port()}", "join_timeout_s": 8.0, "address": "127.0.0.1"}
    model = {"import": TINY, "args": {"pause_s": 0.1}}
    job = write_job(tmp_path / "run.yaml", **SHAPE, model=model, elastic=elastic)

    def node(name: str) -> Started:
        return Started(["env", f"ELASTIC_LSOPT_NODE={name}", str(BIN / "elastic-lsopt"), "train", str(job)], tmp_path)

    first = node("first")
    try:
        first.until(lambda: max(rows(tmp_path / "run"), default=0) >= 1)
        document = tmp_path / "text" / "d03.txt"
        before = document.read_text()
        document.write_text("X" + before[1:])
        second = node("second")
        assert second.wait() == 2, second.output
        document.write_text(before)
        [line] = second.output.splitlines()
        said = "elastic-lsopt: the training data of rank 1 on second is not that of rank 0 on first (digest of the "
        assert line.startswith(said), line
        left = max(rows(tmp_path / "run"))
        first.until(lambda: max(rows(tmp_path / "run")) > left + 1)
        first.process.terminate()
        assert first.wait() == 0, first.output
    finally:
        first.kill()
    found = losses(tmp_path / "run")
    in_ranks(ranks, 1, "job", path=str(write_job(tmp_path / "alone.yaml", **SHAPE | {"max_steps": len(found)})))
    assert found == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
