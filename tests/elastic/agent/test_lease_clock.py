"""Leases run on while a machine is suspended: on CLOCK_BOOTTIME, which a suspension does not stop."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.agent import lease_clock as clock
from elastic_lsopt.elastic.agent.agent import Agent
from tests.elastic.agent.plain_agent import entered, node, pump

pytestmark = pytest.mark.fast


@pytest.mark.long
def test_a_suspended_machine_finds_its_lease_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps longer than a lease: its workers are ended before anything else, whatever time.monotonic says."""
    long: dict[str, Any] = {"lease_s": 10.0, "hang_timeout_s": 60.0}  # a busy machine does not let it end
    host = Agent(node(tmp_path, "a", 1, **long))
    pump([host], 0.1)  # it says its status, by which the other finds it
    agents = [host, Agent(node(tmp_path, "b", 1, host.mailbox.address, join_timeout_s=5.0, **long))]
    try:
        for agent in agents:
            agent._start_worker()
        for _ in range(300):
            pump(agents, 0.1)
            if len({name for name, _, number, _ in entered(tmp_path) if number > 1}) == 2:
                break
        workers = [worker for agent in agents for worker in agent._workers.values()]
        first = agents[1]._state.lease_until_s
        for _ in range(300):
            pump(agents, 0.1)
            if agents[1]._state.lease_until_s > first:
                break
        assert agents[1]._state.lease_until_s > first, "the member's lease is not renewed"
        assert len(workers) == 2 and all(worker.process.poll() is None for worker in workers)

        real = time.clock_gettime

        def after_a_nap(clock: int) -> float:
            return real(clock) + (3600.0 if clock == time.CLOCK_BOOTTIME else 0.0)

        monkeypatch.setattr(time, "clock_gettime", after_a_nap)
        for agent in agents:
            agent._tick()
        of_host, of_member = (worker.process.poll() for worker in workers)
        assert of_host is None, "the host of two is a quorum by itself"
        assert of_member is not None, "the member trains on a lease that ended an hour ago"
    finally:
        for agent in agents:
            for worker in agent._workers.values():
                worker.kill()
            agent.mailbox.close()


def test_the_clock_counts_the_time_since_boot() -> None:
    """In a namespace whose boot lies further back than its monotonic clock says, as after a suspension."""
    program = f"import runpy, time; print(runpy.run_path({clock.__file__!r})['lease_now']() - time.monotonic())"
    command: list[Any] = ["unshare", "--user", "--map-root-user", "--time", "--boottime", "100000", "--fork"]
    command += [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no time namespace can be made here: {done.stderr.strip()[-200:]}")
    here = clock.lease_now() - time.monotonic()
    assert float(done.stdout) == pytest.approx(100000 + here, abs=1.0)
