"""launch/*.sbatch under a real Slurm on this machine: its nodes come and go, its jobs are ended, preempted, requeued.

Every job is the same tiny one, so every job's losses are those of one that ran undisturbed in two plain ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, in_ranks, losses, rows, write_job
from tests.launch.slurm_cluster import Slurm, SlurmJob, missing, slurm

STEPS = 30
SHAPE: dict[str, Any] = {"max_steps": STEPS, "eval_steps": None, "save_steps": None, "workers": 1, "export": False}
ELASTIC = {"lease_s": 4.0, "max_nodes": 4}
FIXED, NODES = "launch/slurm-fixed.sbatch", "launch/slurm.sbatch"
REASON = missing()

pytestmark = [
    pytest.mark.full,  # about three minutes, and most machines have no Slurm
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm: {REASON}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], Any]) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    in_ranks(ranks, 2, "job", path=str(write_job(folder / "run.yaml", **SHAPE)))
    return losses(folder / "run")


class Trained:
    """The run folder of a job whose steps take a while, until it is told to hurry."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self._hurry = folder / "hurry"
        slow = {"import": TINY, "args": {"pause_s": 0.25, "hurry_file": str(self._hurry)}}
        self.file = write_job(folder / "run.yaml", **(SHAPE | {"model": slow} | changes))
        self.folder = folder / "run"

    def hurry(self) -> None:
        self._hurry.touch()

    def step(self) -> int:
        return max(rows(self.folder), default=0)

    def nodes(self) -> set[str]:
        changes = read_journal(self.folder)
        return set(changes[-1]["nodes"]) if changes else set()


def goes_on(job: SlurmJob, trained: Trained, undisturbed: list[float]) -> None:
    """The job, which was told to leave, is queued again and ends as the undisturbed one; with what it had done."""
    job.until(lambda: job.shown("Restarts") == "1")
    stopped = trained.step()
    assert 4 <= stopped < STEPS
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    said = job.log.read_text()
    assert f"stopped after step {stopped} of {STEPS}" in said, said
    assert f"checkpoint-{stopped}, after step {stopped}" in said, said
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)


@pytest.fixture(params=["fixed", "elastic"])
def running(request: pytest.FixtureRequest, tmp_path: Path, cluster: Slurm) -> tuple[SlurmJob, Trained]:
    """A job on two nodes, some steps after its start."""
    elastic = {"elastic": ELASTIC | {"min_nodes": 2}} if request.param == "elastic" else {}
    trained = Trained(tmp_path, **elastic)
    script = NODES if elastic else FIXED
    job = cluster.submit(script, str(trained.file), options=["--nodes=2", "--ntasks-per-node=1"])
    job.until(lambda: trained.step() >= 4)
    return job, trained


def test_two_nodes(running: tuple[SlurmJob, Trained], undisturbed: list[float]) -> None:
    job, trained = running
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    assert job.shown("ExitCode") == "0:0"
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    assert {row["world"] for row in rows(trained.folder).values()} == {2}


def test_the_time_is_nearly_up(running: tuple[SlurmJob, Trained], undisturbed: list[float]) -> None:
    """What `--signal` does: SIGTERM to the steps and not to the script, which has the job queued again."""
    job, trained = running
    job.slurm.call("scancel", "--signal=TERM", job.number)
    goes_on(job, trained, undisturbed)


def test_scontrol_requeue(running: tuple[SlurmJob, Trained], undisturbed: list[float]) -> None:
    job, trained = running
    job.slurm.call("scontrol", "requeue", job.number)
    goes_on(job, trained, undisturbed)


def test_preemption(running: tuple[SlurmJob, Trained], undisturbed: list[float]) -> None:
    """A job of a higher tier wants all nodes: this one saves within the partition's grace time, and comes back."""
    job, trained = running
    urgent = job.slurm.submit("--wrap=sleep 1", options=["--partition=urgent", "--nodes=3"])
    assert urgent.wait() == "COMPLETED"
    goes_on(job, trained, undisturbed)


def test_scancel_saves_and_does_not_come_back(running: tuple[SlurmJob, Trained]) -> None:
    job, trained = running
    job.slurm.call("scancel", job.number)
    assert job.wait() == "CANCELLED", job.log.read_text()
    stopped = trained.step()
    assert f"stopped after step {stopped} of {STEPS}" in job.log.read_text()
    assert (trained.folder / f"checkpoints/checkpoint-{stopped}").exists()


def test_the_allocation_shrinks_and_another_joins(tmp_path: Path, cluster: Slurm, undisturbed: list[float]) -> None:
    """Slurm kills the agent of the node that it takes back; the other goes on by itself. A second job of the same file
    brings a node, whose agent finds the first by the run folder."""
    trained = Trained(tmp_path, elastic=ELASTIC)
    job = cluster.submit(NODES, str(trained.file), options=["--nodes=2"])
    job.until(lambda: trained.nodes() == {"127.0.0.1", "127.0.0.2"} and trained.step() >= 4)
    cluster.call("scontrol", "update", f"jobid={job.number}", "numnodes=1")
    job.until(lambda: trained.nodes() == {"127.0.0.1"})
    alone = trained.step()
    job.until(lambda: trained.step() > alone)
    second = cluster.submit(NODES, str(trained.file), options=["--nodes=1"])
    job.until(lambda: len(trained.nodes()) == 2)
    trained.hurry()
    assert [job.wait(), second.wait()] == ["COMPLETED", "COMPLETED"], job.log.read_text() + second.log.read_text()
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    changes = read_journal(trained.folder)
    assert all(change["source"] != "checkpoint" for change in changes), "a step was done again from a checkpoint"
    assert [len(change["nodes"]) for change in changes][-3:] == [2, 1, 2], changes


def test_a_node_is_given_back(tmp_path: Path, cluster: Slurm, undisturbed: list[float]) -> None:
    """Its step alone is told to leave, so that nothing is done again; then the allocation shrinks."""
    trained = Trained(tmp_path, elastic=ELASTIC)
    job = cluster.submit(NODES, str(trained.file), options=["--nodes=2"])
    job.until(lambda: len(trained.nodes()) == 2 and trained.step() >= 4)
    step = next(line.split()[0] for line in cluster.call("squeue", "-hs", "-o", "%i %N").splitlines() if "0.2" in line)
    cluster.call("scancel", "--signal=TERM", step)
    job.until(lambda: trained.nodes() == {"127.0.0.1"})
    cluster.call("scontrol", "update", f"jobid={job.number}", "nodelist=127.0.0.1")
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    assert [change["redone_steps"] for change in read_journal(trained.folder)] == [0, 0]
