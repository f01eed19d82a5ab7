"""The shell in launch/ and .ci/, and a hostfile whose hosts do not answer."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.jobs import BIN
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.ssh_server import ssh_server

SHELL = sorted(
    path
    for folder in ("launch", ".ci", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".py" and path.read_bytes()[:64].split(b"\n")[0].endswith(b"sh")
)


def _shellcheck(text: str) -> str:
    command = [str(BIN / "shellcheck"), "--shell=bash", "--severity=style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


@pytest.mark.fast
def test_shellcheck() -> None:
    names = {str(path.relative_to(ROOT)) for path in SHELL}
    assert names >= {".ci/run", "launch/slurm.sbatch", "launch/slurm-fixed.sbatch", "launch/deepspeed.sh"}
    for path in SHELL:
        assert not (found := _shellcheck(path.read_text())), f"{path}: {found}"
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    for part in ("setup", "run"):
        assert not (found := _shellcheck(task[part])), f"launch/skypilot.yaml, {part}: {found}"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh client on this machine: install openssh-client")
def test_hosts_that_do_not_answer_are_named(tmp_path: Path) -> None:
    """A name that nobody has, an address of nobody's (RFC 5737), a port that says nothing; and a host that answers."""
    hostfile = tmp_path / "hosts"
    lost = ("no-such-host.invalid", "192.0.2.1", "127.0.0.9")
    hostfile.write_text("127.0.0.1 slots=1\n\n" + "".join(f"{host} slots=1  # gone\n" for host in lost))
    with ssh_server(tmp_path / "ssh") as ssh, socket.create_server((lost[-1], ssh.port)):
        start = time.monotonic()
        done = subprocess.run(
            ["bash", str(ROOT / "launch/deepspeed.sh"), str(hostfile), "no.yaml"], cwd=tmp_path, capture_output=True,
            env=rank_environment(SSH_PORT=str(ssh.port), PATH=f"{ssh.path}:{BIN}:{os.environ['PATH']}"), text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert time.monotonic() - start < 20
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no ssh to" in line and all(host in line for host in lost) and "127.0.0.1" not in line
