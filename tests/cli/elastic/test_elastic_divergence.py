"""An elastic job that diverges goes back to its last good state inside its generation, and on at a lower rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal, read_rewinds
from tests.jobs import TINY, command, rows, run, write_job


@pytest.mark.timeout(300)
def test_an_elastic_job_rewinds_and_ends_well(tmp_path: Path) -> None:
    """The weights after step 6 give NaN: see tests/training/test_divergence.py."""
    job = write_job(
        tmp_path / "run.yaml", model={"import": TINY, "args": {"breaks_at": 0.48}}, landscape={"method": "none"},
        lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=0.4, momentum=0.0, weight_decay=0.0,
        max_steps=12, save_steps=2, save_total_limit=1, eval_steps=None, max_skipped_steps=3, on_divergence="rewind",
        rewind_lr_factor=0.1, eval_fraction=0.2, elastic={},
    )  # fmt: skip
    said, at = run(command("none", job), tmp_path), tmp_path / "run"
    assert "rewound from step 9 to step 4" in said
    assert [row["lr"] for row in rows(at).values()] == pytest.approx([0.4] * 4 + [0.04] * 8)
    assert not any(row["skipped"] for row in rows(at).values())
    assert [rewind["to_step"] for rewind in read_rewinds(at)] == [4]
    changes = len(read_journal(at))  # 1, or 2 where one worker began before the other was there: no change for a rewind
    assert changes == len({row["generation"] for row in rows(at).values()}) <= 2
    assert json.loads((at / "state.json").read_text())["state"] == "finished"
    assert sorted(p.name for p in (at / "checkpoints").iterdir()) == ["checkpoint-12", "diverged-checkpoint-6"]
    assert not list(at.glob(".owner*"))
