"""Mistakes in elastic jobs: one line each, exit code 2; a running job does not notice a bad newcomer."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.elastic.mail.mailbox import LONGEST_BYTES, connect, reachable
from elastic_lsopt.elastic.mail.signing import sign
from elastic_lsopt.elastic.worker.job import refuse_what_counts_steps_or_ranks
from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import BIN, TINY, Started, in_ranks, losses, rows, write_job
from tests.processes.ranks import ROOT, free_port

STEPS = 400
SHAPE: dict[str, Any] = {"max_steps": STEPS, "eval_steps": None, "save_steps": None, "workers": 1, "export": False}
SHAPE |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # so that a shorter job has the same rates
pytestmark = pytest.mark.timeout(300)


def train(job: Path, **environment: str) -> Started:
    more = [f"{name}={value}" for name, value in environment.items()]
    return Started(["env", *more, str(BIN / "elastic-lsopt"), "train", str(job)], job.parent)


def one_line(started: Started, code: int = 2) -> str:
    """What it says as it ends: the package's own line and nothing else."""
    assert started.wait() == code, started.output
    lines = started.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("elastic-lsopt: "), started.output
    return lines[0]


# -- before anything runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"elastic": {"min_nodes": 3, "max_nodes": 2}}, r":\d+: min_nodes=3 is above max_nodes=2"),
        ({"elastic": {"endpoint": "nowhere"}}, r":\d+: .*endpoint='nowhere'"),
        ({"elastic": {"hang_timeout_s": 1.0}}, r":\d+: hang_timeout_s=1 must be above lease_s=2"),
        ({"elastic": {}, "resume_from_checkpoint": "none"}, r"resume_from_checkpoint=none is refused"),
        ({"elastic": {"secret_file": "/no/secret"}}, r"secret_file=/no/secret cannot be read"),
    ],
)
def test_a_wrong_file(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    said = one_line(train(write_job(tmp_path / "run.yaml", **(SHAPE | changes))))
    assert re.search(expected, said), said


def test_an_endpoint_where_nobody_is(tmp_path: Path) -> None:
    """192.0.2.1 is nobody's address (RFC 5737)."""
    elastic = {"endpoint": "192.0.2.1:29400", "join_timeout_s": 1.0, "address": "127.0.0.1"}
    said = one_line(train(write_job(tmp_path / "run.yaml", **SHAPE, elastic=elastic)))
    assert "elastic.endpoint=192.0.2.1:29400" in said and "firewall" in said, said


def test_an_endpoint_that_a_stranger_has_taken(tmp_path: Path) -> None:
    """A program that listens there and speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        threading.Thread(target=_hang_up, args=(stranger,), daemon=True).start()
        elastic = {"endpoint": f"127.0.0.1:{stranger.getsockname()[1]}", "join_timeout_s": 4.0}
        said = one_line(train(write_job(tmp_path / "run.yaml", **SHAPE, elastic=elastic)))
    assert f"elastic.endpoint={elastic['endpoint']}" in said, said


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()
        except OSError:
            return


def test_a_world_too_small_for_its_batch(tmp_path: Path) -> None:
    """Four units a step for one worker that may run two."""
    said = one_line(train(write_job(tmp_path / "run.yaml", **SHAPE, elastic={"max_accumulation": 2})))
    assert re.search(r"a world of 1 worker\(s\) is too small for a global batch of 7.*max_accumulation=2", said), said


# -- newcomers of a running job ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    job: Path
    folder: Path
    endpoint: str
    node: Started

    def newcomer(self, name: str, *, output_dir: Path | None = None, id: str = "run", **changes: Any) -> Path:
        """A file for a second node of the job; with a run folder of its own, as on another machine."""
        elastic = {"endpoint": self.endpoint, "join_timeout_s": 8.0, "address": "127.0.0.1"}
        settings = SHAPE | {"model": SLOW, "elastic": elastic, "output_dir": str(output_dir or self.folder)} | changes
        return write_job(self.job.parent / f"{name}.yaml", **settings)


SLOW = {"import": TINY, "args": {"pause_s": 0.2}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, endpoint = tmp_path_factory.mktemp("running"), f"127.0.0.1:{free_port()}"
    elastic = {"endpoint": endpoint, "join_timeout_s": 8.0, "address": "127.0.0.1"}
    job = write_job(folder / "run.yaml", **SHAPE, model=SLOW, elastic=elastic)
    started = train(job, ELASTIC_LSOPT_NODE="first")
    started.until(lambda: max(rows(folder / "run"), default=0) >= 1)
    yield Running(job, folder / "run", endpoint, started)
    started.kill()


def refused(running: Running, job: Path, **environment: str) -> str:
    newcomer = train(job, ELASTIC_LSOPT_NODE="second", **environment)
    try:
        return one_line(newcomer)
    finally:
        newcomer.kill()


def test_another_config(running: Running) -> None:
    said = refused(running, running.newcomer("config", learning_rate=0.2))
    assert "config.learning_rate is 0.2 on second but 0.1 in the job" in said, said


def test_other_code(running: Running, tmp_path: Path) -> None:
    """A copy of the package with one more comment."""
    shutil.copytree(ROOT / "elastic_lsopt", tmp_path / "elastic_lsopt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "elastic_lsopt/errors.py").open("a") as file:
        file.write("# another comment\n")
    command = f"cd {tmp_path} && exec {sys.executable} -m elastic_lsopt.agent {running.newcomer('code')}"
    newcomer = Started(["env", f"PYTHONPATH={tmp_path}", "ELASTIC_LSOPT_NODE=second", "sh", "-c", command], tmp_path)
    said = one_line(newcomer)
    assert re.search(r"elastic_lsopt is [0-9a-f]{16} on second but [0-9a-f]{16} in the job", said), said


def test_another_job(running: Running) -> None:
    said = refused(running, running.newcomer("id"), ELASTIC_LSOPT_JOB="other")
    assert "job 'other' is not the job here, 'run'" in said, said


def test_a_wrong_secret(running: Running) -> None:
    said = refused(running, running.newcomer("secret"), ELASTIC_LSOPT_SECRET="0123456789abcdef-wrong")
    assert "secret" in said, said


def test_a_clock_that_is_off(running: Running, tmp_path: Path) -> None:
    """A newcomer whose clock is ten minutes ahead."""
    (tmp_path / "sitecustomize.py").write_text("import time\n_now = time.time\ntime.time = lambda: _now() + 600\n")
    said = refused(running, running.newcomer("clock"), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "clock" in said, said


def test_a_stranger_at_the_store(running: Running) -> None:
    """Bytes that are no record, a record under another secret, and one that is too long: refused, and logged once."""
    store = connect(running.endpoint, timedelta(seconds=5))
    wrong = sign({"record": {}}, b"another secret of 16 bytes")
    for message in (b"garbage", wrong, wrong, b"x" * (LONGEST_BYTES + 1)):
        store.queue_push("in", message)
    running.node.until(lambda: "refused a message" in running.node.output)
    assert running.node.output.count("refused a message: a record is not signed with this job's secret") == 1


def test_only_the_given_address_is_listened_on(running: Running) -> None:
    port = running.endpoint.rpartition(":")[2]
    assert reachable(running.endpoint) and not reachable(f"127.0.0.2:{port}")


def test_the_running_job_was_not_disturbed(running: Running, ranks: Callable[[int], Any], tmp_path: Path) -> None:
    """After all newcomers above: one generation, and each loss is that of a job that nobody spoke to."""
    running.node.until(lambda: max(rows(running.folder)) > 6)
    running.node.process.terminate()
    assert running.node.wait() == 0, running.node.output
    found = losses(running.folder)
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "run.yaml", **SHAPE | {"max_steps": len(found)})))
    assert 5 < len(found) < STEPS and found == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert len(read_journal(running.folder)) == 1


# -- what cannot live in an elastic job --------------------------------------------------------------------------------


def engine() -> lso.Engine:
    model = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return lso.Engine(backend_for(model, base), lso.Plain(), loss_fn=lambda model, x: model(x).sum())


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Accelerate's, as in a process that has had no Trainer: it notes the world in one shared state, once."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setattr(state.PartialState, "_shared_state", {})
    return state


def test_an_accelerator_is_refused(state: Any) -> None:
    refuse_what_counts_steps_or_ranks(engine())
    state.PartialState(cpu=True)
    with pytest.raises(lso.Unsupported, match=r"Trainer or an Accelerator.*WORLD_SIZE once"):
        refuse_what_counts_steps_or_ranks(engine())


def test_a_torch_scheduler_is_refused(state: Any) -> None:
    found = engine()
    assert found.base is not None
    torch.optim.lr_scheduler.StepLR(found.base, step_size=1)
    with pytest.raises(lso.Unsupported, match=r"torch scheduler, which counts steps"):
        refuse_what_counts_steps_or_ranks(found)


def test_a_deepspeed_scheduler_is_refused(tmp_path: Path) -> None:
    config = {
        "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    }
    said = one_line(train(write_job(tmp_path / "run.yaml", **SHAPE, elastic={}, backend="deepspeed", deepspeed=config)))
    assert "scheduler" in said, said
