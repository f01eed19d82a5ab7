"""A job that diverges keeps its good checkpoints, exports nothing, says so, and may go back and on at a lower rate.

The model of these jobs gives NaN once a bias has grown past a limit: at this rate with the weights after step 6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.checkpoint.folder import listing, read_json
from elastic_lsopt.elastic.worker.journal import read_journal, read_rewinds
from tests.jobs import TINY, Run, in_ranks, rows, write_job

RATE, BAD_AFTER, SKIPS = 0.4, 6, 3


def diverging(path: Path, **changes: Any) -> Path:
    model = {"import": TINY, "args": {"breaks_at": 0.48}}
    settings = {
        "model": model, "landscape": {"method": "none"}, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        "learning_rate": RATE, "momentum": 0.0, "weight_decay": 0.0, "max_steps": 12, "save_steps": 2,
        "eval_steps": None, "max_skipped_steps": SKIPS, "eval_fraction": 0.2,
    }  # fmt: skip
    return write_job(path, **settings | changes)


def names(folder: Path) -> list[str]:
    return [path.name for path in listing(folder / "checkpoints")]


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize("world", [1, 2])
def test_a_diverged_job_keeps_its_last_good_checkpoint_and_ends_with_an_error(
    ranks: Any, folder: Path, world: int
) -> None:
    """With one checkpoint to keep, and a save just after the step that broke the weights."""
    job = diverging(folder / f"stop{world}.yaml", save_total_limit=1)
    run = folder / f"stop{world}"
    for said in in_ranks(ranks, world, "refused", path=str(job)):
        assert said.startswith(
            f"the job has diverged: {SKIPS} steps in a row were skipped, from step {BAD_AFTER + 1} on"
        )
        assert f"the last good checkpoint is {run}/checkpoints/checkpoint-4" in said and "\n" not in said
    assert [row["skipped"] for row in rows(run).values()] == [False] * BAD_AFTER + [True] * SKIPS
    assert names(run) == ["checkpoint-4"]
    assert (run / "checkpoints" / "diverged-checkpoint-6").is_dir()
    assert not (run / "model").exists()
    told = state(run)
    assert (told["state"], told["step"]) == ("failed", BAD_AFTER + SKIPS) and "has diverged" in told["why"]


def test_weights_that_break_in_the_last_step_are_not_exported(ranks: Any, folder: Path) -> None:
    job = diverging(folder / "last.yaml", max_steps=BAD_AFTER)
    for said in in_ranks(ranks, 2, "refused", path=str(job)):
        assert said.startswith("the job has diverged: the held-out loss after the last step is nan; the last good")
    assert names(folder / "last") == ["checkpoint-4", "checkpoint-2"]
    assert not (folder / "last" / "model").exists()
    assert state(folder / "last")["state"] == "failed"


def test_a_rewound_job_goes_on_from_its_last_good_state(run: Run, folder: Path) -> None:
    """At a lower rate and with other samples, also after a kill; a step that stands twice counts as it was last."""
    job = diverging(folder / "rewind.yaml", on_divergence="rewind", rewind_lr_factor=0.1)
    assert run(2, job)["step"] == 12
    at = folder / "rewind"
    assert [row["lr"] for row in rows(at).values()] == pytest.approx([RATE] * 4 + [RATE / 10] * 8)
    assert not any(row["skipped"] for row in rows(at).values())
    twice = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["loss"] for row in twice if row["step"] == 5)
    assert before != pytest.approx(after, rel=1e-4)  # the same weights, other samples

    [rewind] = read_rewinds(at)
    assert (rewind["from_step"], rewind["to_step"], rewind["lr_factor"]) == (BAD_AFTER + SKIPS, 4, 0.1)
    assert not read_journal(at)
    saved = read_json(at / "checkpoints" / "checkpoint-4" / "contents.json")
    assert saved["facts"]["extra"]["loader"]["rewinds"] == [4 * 7]
    assert state(at)["state"] == "finished" and (at / "model").is_dir()
    assert names(at)[0] == "checkpoint-12"


def test_rewinds_have_an_end(ranks: Any, folder: Path) -> None:
    job = diverging(folder / "often.yaml", on_divergence="rewind", rewind_lr_factor=1.0, max_rewinds=2, save_steps=4)
    for said in in_ranks(ranks, 1, "refused", path=str(job)):
        assert "also after 2 rewinds at lower rates; the last good checkpoint is" in said
    assert [rewind["to_step"] for rewind in read_rewinds(folder / "often")] == [4, 4]
    assert names(folder / "often") == ["checkpoint-4"]
