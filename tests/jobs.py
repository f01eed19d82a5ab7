"""Whole training jobs for the tests: tiny data and settings, and `elastic-lsopt train` started as a user starts it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.processes.ranks import ROOT, Ranks, free_port, rank_environment
from tests.processes.warm import Popen, is_server

WORDS = ["alpha", "beta", "gamma", "delta", "loss", "sharp", "flat", "node", "rank", "shard"]
BIN = Path(sys.executable).parent
LIMIT_S = 180.0
TINY = "tests.cases.elastic.job_models:TinyLM"

SETTINGS: dict[str, Any] = {
    "model": {"import": TINY}, "block_size": 16, "eval_fraction": 0.1, "backend": "fsdp2", "workers": 2,
    "per_device_train_batch_size": 2, "global_batch_size": 7, "max_steps": 8, "optim": "sgd", "momentum": 0.9,
    "learning_rate": 0.1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.25, "weight_decay": 0.01,
    "landscape": {"method": "sam", "rho": 0.05}, "eval_steps": 4, "save_steps": 4,
}  # fmt: skip
Run = Callable[..., dict[str, Any]]
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def corpus(folder: Path, documents: int = 24) -> Path:
    """A folder of text files, the same at each call."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(documents):
        (folder / f"d{i:02}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(120)) + "\n")
    return folder


def write_job(path: Path, **changes: Any) -> Path:
    """A YAML file of SETTINGS with changes; None takes a key out. Data and run lie beside it, if not named."""
    if "dataset" not in changes:
        changes["dataset"] = str(path.parent / "text")
        if not (path.parent / "text").exists():
            corpus(path.parent / "text")
    settings = SETTINGS | {"output_dir": str(path.parent / path.stem)} | changes
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False))
    return path


def command(launcher: str, job: Path, *overrides: str, world: int = 2) -> list[str]:
    """What a user types: launcher `none`, `torchrun` or `deepspeed`."""
    match launcher:
        case "none":
            start = [str(BIN / "elastic-lsopt"), "train"]
        case "torchrun":
            start = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={world}", "-m", "elastic_lsopt.train"]
        case _:
            # A port of its own: the launcher's default is one for all jobs of a machine.
            start = [
                str(BIN / "deepspeed"), f"--num_accelerators={world}", f"--master_port={free_port()}",
                "--no_local_rank", "--module", "elastic_lsopt.train",
            ]  # fmt: skip
    return [*start, str(job), *overrides]


def in_ranks(ranks: Callable[[int], Ranks], world: int, case: str, **arguments: Any) -> list[Any]:
    """Each rank's result of a function in tests/cases/elastic/jobs.py, in processes that are there already."""
    return ranks(world).run(f"tests.cases.elastic.jobs:{case}", timeout_s=LIMIT_S, **arguments)


class Started:
    """A command that runs; its output goes to a file, and a job that outlives its limit is killed with its children."""

    def __init__(self, arguments: Sequence[str], folder: Path, limit_s: float = LIMIT_S) -> None:
        self.arguments, self._end = arguments, time.monotonic() + limit_s
        self._log = folder / f"output-{time.monotonic_ns()}.txt"
        with self._log.open("wb") as out:
            self.process = Popen(
                arguments, cwd=ROOT, env=rank_environment(PATH=f"{BIN}:{os.environ['PATH']}"), stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The process ids of the ranks (the children, for own workers and torchrun)."""
        return [pid for pid in _children(self.process.pid) if not is_server(pid)]

    def named_workers(self) -> dict[str, int]:
        """An elastic job's worker name -> process id of the workers below this command."""
        found = {}
        for pid in self.workers():
            for variable in _told(Path(f"/proc/{pid}/environ")).split("\0"):
                if variable.startswith("ELASTIC_LSOPT_WORKER="):
                    found[variable.partition("=")[2]] = pid
        return found

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for it while the job runs."""
        while not reached():
            assert self.process.poll() is None, f"{self.arguments} ended too early:\n{self.output}"
            self._check_limit()
            time.sleep(0.02)

    def wait(self) -> int:
        """Its exit code."""
        while (code := self.process.poll()) is None:
            self._check_limit()
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        for pid in [*_children(self.process.pid), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def _check_limit(self) -> None:
        if time.monotonic() > self._end:
            self.kill()
            raise AssertionError(f"{self.arguments} took too long:\n{self.output}")


def run(arguments: Sequence[str], folder: Path, *, code: int = 0) -> str:
    """Run a command to its end; its output. Fails with the output where the exit code is another."""
    job = Started(arguments, folder)
    found = job.wait()
    assert found == code, f"{arguments} ended with {found} instead of {code}:\n{job.output}"
    return job.output


def rows(folder: Path) -> dict[int, Mapping[str, Any]]:
    """step -> its object in metrics.jsonl, the last one where a step stands twice, whole lines only."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return {row["step"]: row for row in map(json.loads, text[: text.rfind("\n") + 1].splitlines())}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for _, row in sorted(rows(folder).items())]


def _children(pid: int) -> list[int]:
    found = [int(p) for p in _told(Path(f"/proc/{pid}/task/{pid}/children")).split()]
    return [descendant for child in found for descendant in [*_children(child), child]]


def _told(of_process: Path) -> str:
    """What the system says of a process; nothing where it has ended, which it may do at any moment."""
    try:
        return of_process.read_text(errors="replace")
    except OSError:
        return ""
