"""An ssh server on this machine's loopback addresses, for launchers that reach their hosts by ssh; needs no root.

python -m tests.processes.ssh_server FOLDER PORT     (makes the keys in FOLDER, says "ready", serves until it is killed)

Whoever holds FOLDER/user's key runs commands as the user who runs this. `ssh_of` gives a folder for PATH whose `ssh` is
the system's, told to use that key.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes.ranks import ROOT, free_port, rank_environment

HOSTS = ("127.0.0.1", "127.0.0.2")


@dataclass(frozen=True)
class Ssh:
    port: int
    path: Path
    """Put it first in PATH."""


@contextmanager
def ssh_server(folder: Path) -> Iterator[Ssh]:
    """A running server and its client."""
    system, port = shutil.which("ssh"), free_port()
    assert system is not None
    (folder / "bin").mkdir(parents=True)
    options = f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {system} -F /dev/null {options} "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes.ssh_server", str(folder), str(port)], cwd=ROOT, env=rank_environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        yield Ssh(port, folder / "bin")
    finally:
        server.kill()
        server.wait()


async def serve(folder: Path, port: int) -> None:
    import asyncssh

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        shell = await asyncio.create_subprocess_shell(
            process.command or "true", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await process.redirect(stdout=shell.stdout, stderr=shell.stderr)
        await process.stdout.drain()  # a command that ends may have output on its way, which `exit` would cut off
        await process.stderr.drain()
        process.exit(await shell.wait())

    host, user = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    user.write_private_key(folder / "user")
    (folder / "user").chmod(0o600)
    (folder / "authorized").write_bytes(user.export_public_key())
    for address in HOSTS:
        await asyncssh.listen(
            address, port, server_host_keys=[host], authorized_client_keys=str(folder / "authorized"),
            process_factory=run, encoding=None,
        )  # fmt: skip
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
