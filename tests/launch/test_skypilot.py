"""launch/skypilot.yaml: SkyPilot takes it, and its `run` trains on two machines, also after both were taken."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from elastic_lsopt.elastic.agent.node_folder import addresses
from tests.jobs import Started, losses
from tests.launch.slow_job import ELASTIC, LIMIT_S, SlowJob
from tests.processes.ranks import ROOT, free_port

FILE = ROOT / "launch/skypilot.yaml"
VARIABLES = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
"""What SkyPilot 0.14 sets in each machine's `run`."""


@pytest.mark.fast
def test_run_uses_what_skypilot_sets() -> None:
    task = yaml.safe_load(FILE.read_text())
    named = {word for word in VARIABLES if word in task["run"]}
    assert named == VARIABLES - {"SKYPILOT_NUM_NODES"} and task["run"].count("SKYPILOT_") == len(named)
    assert set(task["envs"]) == {"FILE", "RUN"} and (ROOT / task["envs"]["FILE"]).exists()
    assert task["file_mounts"]["/shared"]["mode"] == "MOUNT" and "output_dir=/shared/" in task["run"]
    (code,) = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert f"exit_code_when_stopped={code}" in task["run"]


@pytest.mark.full
@pytest.mark.skipif(find_spec("sky") is None, reason="no SkyPilot beside this Python: pip install skypilot")
def test_skypilot_takes_it() -> None:
    from sky.utils import schemas  # pyright: ignore[reportMissingImports]

    task = yaml.safe_load(FILE.read_text())
    for schema, found in (
        (schemas.get_task_schema(), task),
        (schemas.get_resources_schema(), task["resources"]),
        (schemas.get_storage_schema(), task["file_mounts"]["/shared"]),
    ):
        assert not list(Draft7Validator(schema).iter_errors(found))


class Machines:
    """Machines of one job, each with what SkyPilot sets there; what this machine has not got is replaced."""

    def __init__(self, job: SlowJob, folder: Path) -> None:
        self._file, self._folder = job.file, folder
        self._run = yaml.safe_load(FILE.read_text())["run"].replace("/shared", str(folder))

    def start(self) -> list[Started]:
        """Two of them, whose first has an address of its own each time."""
        run = self._run.replace("29400", str(free_port()))
        shared = {
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "FILE": str(self._file), "RUN": "run", "ELASTIC_LSOPT_SECRET": "a secret of sixteen bytes at least",
        }  # fmt: skip
        variables = [f"{name}={value}" for name, value in shared.items()]
        return [
            Started(["env", *variables, f"SKYPILOT_NODE_RANK={rank}", "bash", "-c", run], self._folder, limit_s=LIMIT_S)
            for rank in range(2)
        ]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("elsewhere", [2, 1], ids=["all elsewhere", "one elsewhere"])
def test_both_machines_are_taken_and_others_come(tmp_path: Path, undisturbed: list[float], elsewhere: int) -> None:
    """Of those that come `elsewhere` have other addresses than those that were taken."""
    job = SlowJob(tmp_path, elastic=ELASTIC | {"min_nodes": 2}, save_steps=5)
    machines, started = Machines(job, tmp_path), []
    try:
        started = machines.start()
        started[0].until(lambda: job.step() >= 7)
        for machine in started:
            machine.kill()
        with ExitStack() as taken:
            for address in addresses(job.folder)[:elsewhere]:
                host, port = address.rsplit(":", 1)
                taken.enter_context(socket.create_server((host, int(port)), backlog=0))
            job.hurry()
            started = machines.start()
            assert [machine.wait() for machine in started] == [0, 0], [machine.output for machine in started]
        assert any("checkpoint-5, after step 5" in machine.output for machine in started)
        assert losses(job.folder) == pytest.approx(undisturbed, rel=1e-5)
    finally:
        for machine in started:
            machine.kill()
