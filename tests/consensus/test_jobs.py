"""A YAML file's job of several replicas, as a user runs it: what it trains on, how it survives, and what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import Started, command, rows, run, write_job

EVERY = {"rule": "local_sgd", "replicas": 2, "tau": 1}
STEPS = 24


def job(folder: Path, name: str, **changes: Any) -> Path:
    """Two replicas of one process each, whose steps are of two micro-batches."""
    base = {
        "backend": "replicated", "workers": 2, "global_batch_size": 8, "max_steps": STEPS, "momentum": 0.0,
        "landscape": {"method": "none"}, "eval_steps": None, "save_steps": 6, "max_grad_norm": 0.0,
    }  # fmt: skip
    return write_job(folder / f"{name}.yaml", **{**base, **changes})


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def apart(one: Path, two: Path) -> float:
    """How far one model is from the other, as a share of its length."""
    mine, theirs = (torch.cat([t.double().reshape(-1) for _, t in sorted(model(f).items())]) for f in (one, two))
    return float((mine - theirs).norm() / mine.norm())


def test_meeting_at_every_step_is_one_job(tmp_path: Path) -> None:
    """tau = 1 and full pull under plain SGD: synchronous data parallelism, on the same samples, at the same rates."""
    steps = 12
    run(command("none", job(tmp_path, "together", max_steps=steps)), tmp_path)
    run(command("none", job(tmp_path, "apart", max_steps=steps, consensus=EVERY)), tmp_path)
    assert apart(tmp_path / "together", tmp_path / "apart") <= 1e-6
    one, two = rows(tmp_path / "together"), rows(tmp_path / "apart")
    assert [r["lr"] for r in one.values()] == [r["lr"] for r in two.values()]
    others = rows(tmp_path / "apart" / "replica-1")
    for step, row in one.items():
        assert (two[step]["loss"] + others[step]["loss"]) / 2 == pytest.approx(row["loss"], abs=2e-6)
    assert two[steps]["eval_loss"] == pytest.approx(one[steps]["eval_loss"], abs=1e-6)


DRIFTING: dict[str, Any] = {
    "consensus": {**EVERY, "rule": "easgd", "tau": 3, "disagreement_span": 2}, "momentum": 0.9,
    "report_to": ["tensorboard"], "probes": {"lambda_max": {"every_steps": 12, "budget": 1.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    run(command("none", job(folder, "whole", **DRIFTING)), folder)
    return folder


def test_killed_and_started_again(undisturbed: Path) -> None:
    """Each replica goes on from its own weights, momentum and centre: the same bits as without the kill."""
    file = job(undisturbed, "killed", **DRIFTING)
    started = Started(command("none", file), undisturbed)
    folder = undisturbed / "killed"
    started.until(lambda: all((f / "checkpoints" / "checkpoint-12").exists() for f in (folder, folder / "replica-1")))
    started.kill()
    said = run(command("none", file), undisturbed)
    assert "resumed from" in said
    whole = undisturbed / "whole"
    assert apart(whole, folder) == 0.0
    for here, there in ((whole, folder), (whole / "replica-1", folder / "replica-1")):
        one, two = rows(here), rows(there)
        assert {s: r["loss"] for s, r in one.items()} == {s: r["loss"] for s, r in two.items()}
        assert disagreement(here) == disagreement(there), "the span goes on"
    losses = [rows(f)[STEPS]["loss"] for f in (folder, folder / "replica-1")]
    assert losses[0] != losses[1], "replicas stay different"


def disagreement(folder: Path) -> dict[int, dict[str, Any]]:
    """What each exchange has told of it, by the step that follows."""
    told = {step: row["exchange"] for step, row in rows(folder).items() if "exchange" in row}
    apart = ("number", "seconds", "sent_bytes")
    return {step: {k: v for k, v in exchange.items() if k not in apart} for step, exchange in told.items()}


def test_what_exchanges_tell_of_disagreement(undisturbed: Path) -> None:
    """Both replicas tell the same distances, each the share of its own gradient; TensorBoard has them too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, other = undisturbed / "whole", undisturbed / "whole" / "replica-1"
    one, two = disagreement(whole), disagreement(other)
    assert [*one] == [*two] == [4, 7, 10, 13, 16, 19, 22]
    for i, step in enumerate(one):
        mine, theirs = one[step], two[step]
        for key in ("consensus_distance", "valley_width", "distances", "shares", "effective_rank"):
            assert mine[key] == theirs[key]
        assert mine["distances"][0] == pytest.approx(mine["distances"][1]) == pytest.approx(mine["valley_width"])
        assert mine["shares"] == [1.0] and mine["valley_width"] > 0
        assert mine["consensus_distance"] == pytest.approx(mine["valley_width"])
        assert 0 < mine["gradient_share"] <= 1 and mine["gradient_share"] != theirs["gradient_share"]
        assert mine["span"] == min(i + 1, 2)
    beside = rows(whole)[12]["probes"]["lambda_max"]["disagreement"]
    assert beside["span"] == 2 and beside["eigenvector_shares"] == pytest.approx([2 * beside["span_share"]])
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    told = {event.step: event.value for event in board.Scalars("exchange/consensus_distance")}
    assert told == pytest.approx({step: exchange["consensus_distance"] for step, exchange in one.items()})


@pytest.mark.parametrize("elastic", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_first_replica_has_lost_the_end(undisturbed: Path, elastic: bool) -> None:
    """Its folder is gone, or its last save has failed, when the other has trained to the end: the other exports."""
    name = f"lost-{elastic}"
    own = {"elastic": {"max_nodes": 1}} if elastic else {}
    shutil.copytree(undisturbed / "whole", undisturbed / name)
    for gone in ("model", "checkpoints"):
        shutil.rmtree(undisturbed / name / gone)
    run(command("none", job(undisturbed, name, **DRIFTING, **own)), undisturbed)
    alone = load_file(undisturbed / name / "model" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in alone.values())
    assert apart(undisturbed / name, undisturbed / "whole") <= 0.1
    assert json.loads((undisturbed / name / "state.json").read_text())["state"] == "finished"


@pytest.mark.full
def test_going_on_from_an_earlier_checkpoint(undisturbed: Path) -> None:
    """The path is of replica 0; the others take their own of that name, and go on with the same bits."""
    block = {**EVERY, "rule": "easgd", "tau": 3}
    file = job(undisturbed, "earlier", consensus=block, momentum=0.9, save_total_limit=None)
    run(command("none", file), undisturbed)
    folders = [undisturbed / "earlier", undisturbed / "earlier" / "replica-1"]
    before = [rows(folder)[STEPS]["loss"] for folder in folders]
    path = folders[0] / "checkpoints" / "checkpoint-12"
    assert "resumed from" in run(command("none", file, f"resume_from_checkpoint={path}"), undisturbed)
    assert [rows(folder)[STEPS]["loss"] for folder in folders] == before
    shutil.rmtree(folders[1] / "checkpoints")
    said = run(command("none", file, f"resume_from_checkpoint={path}"), undisturbed, code=2)
    assert "is of replica 0, and there is none of replica 1 beside it" in said and "Traceback" not in said


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_started_again_with_another_number_of_replicas(tmp_path: Path, before: int, after: int) -> None:
    """Those that are missing are given the model at the first exchange; what was dealt to the surplus is dealt again.
    Each sample counts once, and the job ends where it would have ended."""

    def block(replicas: int) -> str:
        return f"consensus={{rule: easgd, replicas: {replicas}, tau: 3}}"

    file = job(tmp_path, "more", momentum=0.9, save_total_limit=None)
    run(command("none", file, block(before), f"workers={before}", "max_steps=12"), tmp_path)
    said = run(command("none", file, block(after), f"workers={after}"), tmp_path)
    assert ("the model is given to replicas 2, 3" in said) == (after > before)
    folders = [tmp_path / "more", *(tmp_path / "more" / f"replica-{r}" for r in range(1, after))]
    ends = [max(rows(f).values(), key=lambda r: r["step"]) for f in folders]
    assert [e["samples"] for e in ends] == [8 * STEPS] * after
    assert len({e["loss"] for e in ends}) == after
