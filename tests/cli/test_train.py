"""`elastic-lsopt train` as a user runs it: what it leaves and says, and how it survives signals and kills."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.config.load import load_config
from elastic_lsopt.training.datasets.samples import build_data
from tests.jobs import LLAMA, TINY, Started, command, in_ranks, losses, rows, run, write_job
from tests.processes.ranks import ROOT, rank_environment


@dataclass(frozen=True)
class Finished:
    job: Path
    folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run with everything that it can leave: two own workers, FSDP2, SAM, a Llama."""
    folder = tmp_path_factory.mktemp("train")
    job = write_job(folder / "run.yaml", model=LLAMA, report_to=["tensorboard"], save_total_limit=1)
    output = run(command("none", job), folder)
    return Finished(job, folder / "run", output.splitlines())


def test_the_run_folder(finished: Finished) -> None:
    assert {p.name for p in finished.folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "state.json", "tensorboard", "checkpoints", "loss.png", "model",
    }  # fmt: skip
    assert load_config(finished.folder / "config.yaml") == read_job(finished.job).config
    assert [p.name for p in (finished.folder / "checkpoints").iterdir()] == ["checkpoint-8"]
    assert (finished.folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_every_row_is_an_object_of_the_design(finished: Finished) -> None:
    found = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, 9))
    assert all(
        {"generation", "step", "samples", "loss", "lr", "batch", "world", "seconds"} <= row.keys() for row in found
    )


def test_tensorboard_reads_the_same_losses(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(finished.folder), rel=1e-6)
    assert [e.step for e in events.Scalars("eval_loss")] == [4, 8]


def test_the_exported_model_has_the_held_out_loss_that_was_reported(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    held_out = build_data(read_job(finished.job).config).eval
    ids = torch.stack([torch.from_numpy(held_out[i].astype("int64")) for i in range(len(held_out))])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(rows(finished.folder)[8]["eval_loss"], rel=1e-5)
    files = list((finished.job.parent / "text").iterdir())
    size = sum(f.stat().st_size for f in files)
    a_byte = loss * (size + len(files)) / size  # a byte is a token, and each document has an end
    assert any(
        line.startswith(f"held-out loss: {a_byte:.4f} nats a byte, NOT below the corpus's") for line in finished.said
    )


def test_what_it_says(finished: Finished) -> None:
    assert finished.said[0].startswith("LlamaForCausalLM, 13,424 trainable parameters; fsdp2 on 2 cpu ranks; SAM(rho=")
    assert sum(line.startswith("step ") for line in finished.said) <= 8
    assert finished.said[-1].startswith("use it: transformers.AutoModelForCausalLM.from_pretrained(")
    assert len(finished.said) <= 12, finished.said


# -- signals and kills -------------------------------------------------------------------------------------------------

STEPS = 40
LONG = pytest.mark.timeout(900)  # the first test that asks for `battered` waits for five lives


@dataclass(frozen=True)
class Life:
    """How one start of the battered job ended."""

    code: int
    output: str
    last_step: int
    """In metrics.jsonl when it had ended."""
    checkpoints: list[str]
    state: dict[str, Any]
    """state.json."""


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory, ranks: object) -> tuple[dict[str, Life], Path, Path]:
    """One job of 40 steps, ended five times in the middle of a pass in five ways, each time started again.

    Its lives, its run folder, and that of the same job undisturbed.
    """
    folder = tmp_path_factory.mktemp("battered")
    slow = {"import": TINY, "args": {"pause_s": 0.02}}
    shape = {"max_steps": STEPS, "eval_steps": 10, "save_steps": 5}
    job = write_job(folder / "run.yaml", model=slow, **shape)
    lives = {}

    def live(name: str, launcher: str, at: int, strike: object, *overrides: str, saved: str = "") -> None:
        before = max(rows(folder / "run"), default=0)  # those stay: only later ones are of this life
        started = Started(command(launcher, job, *overrides), folder)
        started.until(lambda: max(rows(folder / "run"), default=0) >= max(at, before + 2))
        started.until((folder / "run/checkpoints" / saved).exists)
        strike(started)  # type: ignore[operator]
        code = started.wait()
        lives[name] = Life(
            code, started.output, max(rows(folder / "run")), [p.name for p in (folder / "run/checkpoints").glob("c*")],
            json.loads((folder / "run/state.json").read_text()),
        )  # fmt: skip

    live("killed worker", "none", 7, lambda s: os.kill(s.workers()[1], signal.SIGKILL), saved="checkpoint-5")

    def kill_parent(started: Started) -> None:
        workers = started.workers()
        started.process.send_signal(signal.SIGKILL)
        started.process.wait()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{w}/stat").exists() for w in workers):
            assert time.monotonic() < end, "the workers outlived their parent"
            time.sleep(0.05)

    live("killed parent", "none", 12, kill_parent)
    live("terminated parent", "none", 16, lambda s: s.process.terminate())
    live("terminated torchrun", "torchrun", 20, lambda s: s.process.terminate())
    stopped = "exit_code_when_stopped=85"
    live("terminated worker", "none", 24, lambda s: os.kill(s.workers()[1], signal.SIGTERM), stopped)
    in_ranks(ranks, 3, "job", path=str(write_job(folder / "run.yaml", **shape)))  # type: ignore[arg-type]
    in_ranks(ranks, 2, "job", path=str(write_job(folder / "undisturbed.yaml", **shape)))  # type: ignore[arg-type]
    return lives, folder / "run", folder / "undisturbed"


Battered = tuple[dict[str, Life], Path, Path]


@LONG
def test_a_battered_run_is_an_undisturbed_run(battered: Battered) -> None:
    _, run_folder, undisturbed = battered
    assert len(losses(run_folder)) == STEPS
    assert losses(run_folder) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert {row["world"] for row in rows(run_folder).values()} == {2, 3}
    for step in (10, 20, 30, 40):
        assert rows(run_folder)[step]["eval_loss"] == pytest.approx(rows(undisturbed)[step]["eval_loss"], rel=1e-6)


@LONG
def test_a_killed_worker_ends_the_job_and_is_named(battered: Battered) -> None:
    life = battered[0]["killed worker"]
    assert life.code == 128 + signal.SIGKILL
    assert "worker 1 was ended by SIGKILL" in life.output
    # Those of every fifth step, and none of the step at which it ended.
    assert "checkpoint-5" in life.checkpoints and all(int(c.rpartition("-")[2]) % 5 == 0 for c in life.checkpoints)


@LONG
@pytest.mark.parametrize("name", ["killed parent", "terminated parent", "terminated torchrun", "terminated worker"])
def test_a_stop_saves_the_very_step(battered: Battered, name: str) -> None:
    life = battered[0][name]
    assert f"checkpoint-{life.last_step}" in life.checkpoints
    assert life.last_step < STEPS
    last = [line for line in life.output.splitlines() if line][-1]
    if name.endswith(("parent", "worker")):
        assert last == f"stopped after step {life.last_step} of {STEPS}; the same command goes on from there."
    else:  # torchrun ends with a traceback of its own
        assert f"stopped after step {life.last_step} of {STEPS}; the same command" in life.output


@LONG
@pytest.mark.parametrize(("name", "code"), [("terminated parent", 0), ("terminated worker", 85)])
def test_a_stop_is_no_failure_and_is_told_from_an_end(battered: Battered, name: str, code: int) -> None:
    life = battered[0][name]
    assert life.code == code
    assert (life.state["state"], life.state["step"], life.state["steps"]) == ("stopped", life.last_step, STEPS)


@LONG
def test_the_run_folder_says_how_each_life_ended(battered: Battered) -> None:
    lives, run_folder, _ = battered
    assert lives["killed worker"].state["state"] == "failed"  # its peer has said so
    finished = json.loads((run_folder / "state.json").read_text())
    assert (finished["state"], finished["step"], finished["why"]) == ("finished", STEPS, "")
    assert not list(run_folder.glob(".owner*"))


# -- the terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    job = write_job(tmp_path / "run.yaml", workers=1, export=False)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("none", job), cwd=ROOT, env=rank_environment(TERM="xterm-256color", COLUMNS="120"), stdin=slave,
        stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    said = b""
    try:
        while chunk := os.read(master, 4096):
            said += chunk
    except OSError:  # the other end has closed
        pass
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert process.wait(timeout=60) == 0, text
    assert "step 8/8" in text.replace("  ", " ")
    assert "held out" in text
    assert "━" in text
    assert text.strip().splitlines()[-1].startswith("pictures, metrics and checkpoints:")
