"""`elastic-lsopt train` with an elastic block on one node: what a user sees when a worker dies, and on SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, Started, command, in_ranks, losses, rows, write_job
from tests.processes.ranks import free_port

STEPS = 40
SLOW = {"import": TINY, "args": {"pause_s": 0.02}}
SHAPE: dict[str, Any] = {"max_steps": STEPS, "eval_steps": 20, "save_steps": 15, "workers": 3}
PROBES = {
    "lambda_max": {"every_steps": 6, "units": 2, "budget": 1.0}, "trajectory": {"every_steps": 6},
    "pac_bayes": {"every_steps": 18, "units": 2, "budget": 1.0, "draws": 1, "tolerance": 1e-2},
}  # fmt: skip
LIMIT = pytest.mark.timeout(400)  # the first test that asks for a job waits for all of it


@dataclass(frozen=True)
class Life:
    code: int
    said: list[str]
    folder: Path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], Any]) -> dict[int, Any]:
    """step -> its row, of the same job without an elastic block, on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    in_ranks(ranks, 2, "job", path=str(write_job(folder / "run.yaml", export=False, probes=PROBES, **SHAPE)))
    return dict(rows(folder / "run"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """A job of three workers, whose rank 0 is killed after some steps."""
    folder = tmp_path_factory.mktemp("killed")
    alone, hurry = folder / "alone", folder / "hurry"
    slow = {"pause_s": 0.05, "hurry_file": str(hurry), "held_from": 4, "held_file": str(alone)}
    job = write_job(folder / "run.yaml", model={"import": TINY, "args": slow}, elastic={}, probes=PROBES, **SHAPE)
    started = Started(command("none", job), folder)
    run_folder = folder / "run"
    started.until(lambda: _world(run_folder) == 3 and _step(run_folder) >= 8)
    first = read_journal(run_folder)[-1]["workers"][0]
    os.kill(started.named_workers()[first], signal.SIGKILL)
    started.until(lambda: any(row["world"] == 2 for row in rows(run_folder).values()))
    alone.touch()  # not before: else the one in its place might be there before the others go on without it
    started.until(lambda: _world(run_folder) == 3)
    hurry.touch()  # not before: else the job might end before that one is there
    code = started.wait()
    return Life(code, started.output.splitlines(), run_folder)


@LIMIT
def test_the_loss_of_each_step_is_the_undisturbed_ones(killed: Life, undisturbed: dict[int, Any]) -> None:
    assert killed.code == 0, killed.said
    found = rows(killed.folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert losses(killed.folder) == pytest.approx([undisturbed[s]["loss"] for s in sorted(undisturbed)], rel=1e-5)
    for step in (20, 40):
        assert found[step]["eval_loss"] == pytest.approx(undisturbed[step]["eval_loss"], rel=1e-5)
    assert {row["world"] for row in found.values()} >= {2, 3}


@LIMIT
def test_probes_are_the_undisturbed_ones(killed: Life, undisturbed: dict[int, Any]) -> None:
    """The sharpness at each point, whoever trains there; a new generation's trajectory begins where it does."""
    found, wanted = (
        {step: row["probes"]["lambda_max"]["eigenvalues"][0] for step, row in life.items() if "probes" in row}
        for life in (rows(killed.folder), undisturbed)
    )
    assert list(found) == list(wanted) == list(range(6, STEPS + 1, 6))
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=2e-3)
    for step in (18, 36):  # from where the job began, also for those who came later
        far, wanted_far = (life[step]["probes"]["pac_bayes"] for life in (rows(killed.folder), undisturbed))
        assert far["square_distance"] == pytest.approx(wanted_far["square_distance"], rel=1e-4) != 0


@LIMIT
def test_the_worker_is_lost_and_another_takes_its_place(killed: Life) -> None:
    changes = read_journal(killed.folder)
    death = next(i for i, c in enumerate(changes) if c["gone"])
    assert len(changes[death]["workers"]) == 2
    assert changes[death]["source"] == "memory"
    assert changes[death]["redone_steps"] <= 1
    assert len(changes[-1]["workers"]) == 3
    assert set(changes[-1]["workers"]).isdisjoint(changes[death]["gone"])


@LIMIT
def test_a_line_of_the_journal(killed: Life) -> None:
    """What a change was, and what it changed: nothing of batch, rate, betas and rho under keep_batch."""
    changes = read_journal(killed.folder)
    death = next(c for c in changes if c["gone"])
    assert death["before"] | {"units": 0} == death["after"] | {"units": 0}
    job = {"global_batch_size": 7, "learning_rate": 0.1, "momentum": 0.9, "rho": 0.05, "weight_decay": 0.01}
    assert death["after"].items() >= job.items()
    assert sum(death["before"]["units"]) == sum(death["after"]["units"]) == 4
    phases = ["detect", "take_down", "wait", "form", "agree", "build", "reshard", "mirror", "first_step"]
    assert list(death["seconds"]) == phases and all(s >= 0 for s in death["seconds"].values())
    assert 0.01 < sum(death["seconds"].values()) < 60
    # Rank 1 mirrored rank 0, whose place it takes, and rank 2 mirrored rank 1: each has what it needs.
    assert death["bytes_moved"] == 0 < changes[-1]["bytes_moved"]
    assert death["samples"] == 7 * death["step"] and death["source"] == "memory"


@LIMIT
def test_the_run_folder(killed: Life) -> None:
    assert {p.name for p in killed.folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "state.json", "journal.jsonl", "checkpoints", "loss.png", "members.png",
        "model", "elastic",
    }  # fmt: skip
    assert (killed.folder / "members.png").read_bytes()[:4] == b"\x89PNG"
    assert (killed.folder / "model/model.safetensors").exists()
    assert "checkpoint-40" in {p.name for p in (killed.folder / "checkpoints").iterdir()}


@LIMIT
def test_what_it_says(killed: Life) -> None:
    """The introduction once, a line a change, the result once; no torch warnings, no tracebacks."""
    said = "\n".join(killed.said)
    changes = read_journal(killed.folder)
    assert said.count("trainable parameters") == 1
    assert sum(line.startswith("generation ") for line in killed.said) == len(changes)
    assert any(line.startswith(f"generation {c['generation']}: died: ") for c in changes for line in killed.said), said
    assert said.count("held-out loss:") == 1
    assert killed.said[-1].startswith("use it: ")
    assert "Traceback" not in said and "[W" not in said and "[E" not in said, said


@LIMIT
@pytest.mark.parametrize(
    "told", [*(pytest.param(t, marks=pytest.mark.full) for t in ("agent", "everybody")), "workers"]
)
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, undisturbed: dict[int, Any], told: str) -> None:
    """To the agent, as a person does, to all processes at once, as some launchers do, or to the workers alone, of which
    the agent hears one after the other."""
    job = write_job(tmp_path / "run.yaml", model=SLOW, elastic={}, export=False, **(SHAPE | {"workers": 2}))
    first = Started(command("none", job), tmp_path)
    first.until(lambda: _world(tmp_path / "run") == 2 and _step(tmp_path / "run") >= 6)
    workers = [] if told == "agent" else [*first.named_workers().values()]
    for pid in [*workers, *([first.process.pid] if told != "workers" else [])]:
        os.kill(pid, signal.SIGTERM)
    assert first.wait() == 0, first.output
    stopped = _step(tmp_path / "run")
    assert stopped < STEPS
    # Where the agent hears all its workers before the signal, they have paused the job.
    said = f"stopped after step {stopped} of {STEPS}; the same", f"paused after step {stopped} of {STEPS}: it goes on"
    assert any(line in first.output for line in said), first.output
    assert "node" not in first.output, first.output
    second = Started(command("none", job), tmp_path)
    assert second.wait() == 0, second.output
    assert f"checkpoint-{stopped}, after step {stopped}" in second.output
    assert losses(tmp_path / "run") == pytest.approx([undisturbed[s]["loss"] for s in sorted(undisturbed)], rel=1e-5)


@LIMIT
def test_a_job_that_waits_for_nodes_has_saved_and_can_be_ended(tmp_path: Path, undisturbed: dict[int, Any]) -> None:
    """One of two nodes leaves, `min_nodes` are two: the other waits, is told to end, and both start again later.
    Neither ends with 0 before the job does: a scheduler would take that for its end."""
    elastic = {"endpoint": f"127.0.0.1:{free_port()}", "address": "127.0.0.1", "min_nodes": 2}
    shape = SHAPE | {"workers": 1, "save_steps": None, "exit_code_when_stopped": 85}
    job, run = write_job(tmp_path / "run.yaml", model=SLOW, elastic=elastic, export=False, **shape), tmp_path / "run"

    def start(name: str) -> Started:
        return Started(["env", f"ELASTIC_LSOPT_NODE={name}", *command("none", job)], tmp_path)

    first, second = start("n1"), start("n2")
    first.until(lambda: _step(run) >= 6)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 85, second.output
    stopped = _step(run)
    first.until((run / f"checkpoints/checkpoint-{stopped}").exists)
    time.sleep(1.0)
    assert _step(run) == stopped < STEPS, "one node went on alone"
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 85, first.output
    both = start("n1"), start("n2")
    assert [node.wait() for node in both] == [0, 0], [node.output for node in both]
    assert f"checkpoint-{stopped}, after step {stopped}" in both[0].output + both[1].output
    assert losses(run) == pytest.approx([undisturbed[s]["loss"] for s in sorted(undisturbed)], rel=1e-5)


@LIMIT
def test_two_kills_of_everything_resume_from_the_checkpoint(tmp_path: Path, undisturbed: dict[int, Any]) -> None:
    """The agent itself is killed: its workers die with it, and the same command goes on from the last checkpoint."""
    job = write_job(tmp_path / "run.yaml", model=SLOW, elastic={}, export=False, **(SHAPE | {"workers": 2}))
    first = Started(command("none", job), tmp_path)
    checkpoints = tmp_path / "run/checkpoints"
    first.until(lambda: _step(tmp_path / "run") >= 20 and (checkpoints / "checkpoint-15").exists())
    workers = first.named_workers().values()
    first.process.kill()
    first.process.wait()
    end = time.monotonic() + 20
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < end, "the workers outlived their agent"
        time.sleep(0.05)
    saved = max(int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*[0-9]"))
    second = Started(command("none", job), tmp_path)
    assert second.wait() == 0, second.output
    assert saved % 15 == 0 and f"checkpoint-{saved}, after step {saved}" in second.output
    assert losses(tmp_path / "run") == pytest.approx([undisturbed[s]["loss"] for s in sorted(undisturbed)], rel=1e-5)


def _world(folder: Path) -> int:
    changes = read_journal(folder)
    return len(changes[-1]["workers"]) if changes else 0


def _step(folder: Path) -> int:
    return max(rows(folder), default=0)


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False
