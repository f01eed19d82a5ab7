"""launch/*.sbatch under a real Slurm on this machine: nodes come and go, jobs are ended, preempted and queued again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import losses, rows
from tests.launch.slow_job import ELASTIC, STEPS, SlowJob
from tests.launch.slurm_cluster import Slurm, SlurmJob, missing, slurm

FIXED, NODES = "launch/slurm-fixed.sbatch", "launch/slurm.sbatch"
REASON = missing()

pytestmark = [
    pytest.mark.full,  # a quarter of an hour on two busy cores, and most machines have no Slurm
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm: {REASON}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as found:
        yield found


def hosts(trained: SlowJob) -> set[str]:
    """The machines that train together now; a node is called after its machine, its job and its start."""
    return {name.partition("-")[0] for name in trained.nodes()}


def stopped_after(job: SlurmJob, trained: SlowJob) -> int:
    """The step after which it has saved. (Its own words may be lost: srun, told to end, passes no more on.)"""
    job.until(lambda: any(trained.folder.glob("checkpoints/checkpoint-*")))
    (saved,) = trained.folder.glob("checkpoints/checkpoint-*")
    return int(saved.name.partition("-")[2])


def goes_on(job: SlurmJob, trained: SlowJob, undisturbed: list[float]) -> None:
    """The job, which was told to leave, saves, is queued again, and ends as the undisturbed one does."""
    stopped = stopped_after(job, trained)
    assert 4 <= stopped < STEPS
    job.until(lambda: job.shown("Restarts") == "1")
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    assert f"checkpoint-{stopped}, after step {stopped}" in job.log.read_text()
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)


@pytest.fixture(params=["fixed", "elastic"])
def running(request: pytest.FixtureRequest, tmp_path: Path, cluster: Slurm) -> tuple[SlurmJob, SlowJob]:
    """A job on two nodes, some steps after its start."""
    elastic = {"elastic": ELASTIC | {"min_nodes": 2}} if request.param == "elastic" else {}
    trained = SlowJob(tmp_path, **elastic)
    script = NODES if elastic else FIXED
    job = cluster.submit(script, str(trained.file), options=["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"])
    job.until(lambda: trained.step() >= 4)
    return job, trained


def test_two_nodes(running: tuple[SlurmJob, SlowJob], undisturbed: list[float]) -> None:
    job, trained = running
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    assert job.shown("ExitCode") == "0:0"
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    assert {row["world"] for row in rows(trained.folder).values()} == {2}


def test_the_time_is_nearly_up(running: tuple[SlurmJob, SlowJob], undisturbed: list[float]) -> None:
    """What `--signal` does: SIGTERM to the steps and not to the script, which has the job queued again."""
    job, trained = running
    job.slurm.call("scancel", "--signal=TERM", job.number)
    goes_on(job, trained, undisturbed)


def test_scontrol_requeue(running: tuple[SlurmJob, SlowJob], undisturbed: list[float]) -> None:
    job, trained = running
    job.slurm.call("scontrol", "requeue", job.number)
    goes_on(job, trained, undisturbed)


def test_preemption(running: tuple[SlurmJob, SlowJob], undisturbed: list[float]) -> None:
    """A job of a higher tier wants all nodes: this one saves within the partition's grace time, and comes back."""
    job, trained = running
    urgent = job.slurm.submit("--wrap=sleep 1", options=["--partition=urgent", "--nodes=3"])
    assert urgent.wait() == "COMPLETED"
    goes_on(job, trained, undisturbed)


def test_scancel_saves_and_does_not_come_back(running: tuple[SlurmJob, SlowJob]) -> None:
    job, trained = running
    job.slurm.call("scancel", job.number)
    assert job.wait() == "CANCELLED", job.log.read_text()
    assert stopped_after(job, trained) == trained.step()


def test_the_allocation_shrinks_and_another_joins(tmp_path: Path, cluster: Slurm, undisturbed: list[float]) -> None:
    """Slurm kills the agent of the node that it takes back; the others go on by themselves. A second job of the same
    file brings a node, whose agent finds the first's by the run folder."""
    trained = SlowJob(tmp_path, elastic=ELASTIC)
    job = cluster.submit(NODES, str(trained.file), options=["--nodes=3"])
    job.until(lambda: len(trained.nodes()) == 3 and trained.step() >= 4)
    cluster.call("scontrol", "update", f"jobid={job.number}", "numnodes=2")
    job.until(lambda: hosts(trained) == {"127.0.0.1", "127.0.0.2"})
    fewer = trained.step()
    job.until(lambda: trained.step() > fewer)
    second = cluster.submit(NODES, str(trained.file), options=["--nodes=1"])
    job.until(lambda: len(trained.nodes()) == 3)
    trained.hurry()
    assert [job.wait(), second.wait()] == ["COMPLETED", "COMPLETED"], job.log.read_text() + second.log.read_text()
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    changes = read_journal(trained.folder)
    assert all(change["source"] != "checkpoint" for change in changes), "steps were done again from a checkpoint"
    assert [len(change["nodes"]) for change in changes][-3:] == [3, 2, 3], changes


def test_a_node_is_given_back(tmp_path: Path, cluster: Slurm, undisturbed: list[float]) -> None:
    """Its step alone is told to leave, so that nothing is done again; then the allocation shrinks."""
    trained = SlowJob(tmp_path, elastic=ELASTIC)
    job = cluster.submit(NODES, str(trained.file), options=["--nodes=2"])
    job.until(lambda: len(trained.nodes()) == 2 and trained.step() >= 4)
    steps = cluster.call("squeue", "--noheader", "--steps", "--format=%j %N %i").splitlines()
    (agent,) = [step.split()[-1] for step in steps if step.startswith("agent 127.0.0.2 ")]
    cluster.leave(agent)
    job.until(lambda: hosts(trained) == {"127.0.0.1"})
    cluster.call("scontrol", "update", f"jobid={job.number}", "nodelist=127.0.0.1")
    trained.hurry()
    assert job.wait() == "COMPLETED", job.log.read_text()
    assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
    assert not any(change["redone_steps"] for change in read_journal(trained.folder))


def test_the_first_machine_fails(tmp_path: Path, undisturbed: list[float]) -> None:
    """The job, whose script ran there, is queued again by the machine that is left, and starts there and on another."""
    with slurm() as cluster:
        trained = SlowJob(tmp_path, elastic=ELASTIC | {"min_nodes": 2}, save_steps=5)
        job = cluster.submit(NODES, str(trained.file), options=["--nodes=2"])
        job.until(lambda: trained.step() >= 7)
        cluster.lose("127.0.0.1")
        job.until(lambda: job.shown("Restarts") == "1")
        trained.hurry()
        assert job.wait() == "COMPLETED", job.log.read_text()
        assert hosts(trained) == {"127.0.0.2", "127.0.0.3"}
        assert losses(trained.folder) == pytest.approx(undisturbed, rel=1e-5)
