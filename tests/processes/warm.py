"""Processes that start in a tenth of a second: forked from one that has imported torch, DeepSpeed and transformers.

Imports cost a new Python 2 to 6 s of a core, and a test that starts a job pays them for each agent and each worker.
`Popen` is `subprocess.Popen`, and starts what would be a new Python of this environment by a fork of the warm server
(tests/processes/warm_server.py). Whatever else it is given, it executes. `LSOPT_TESTS_EXEC=1` executes everything.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "LSOPT_TESTS_WARM"
"""Names the socket of the server that forks for this process."""
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = ("elastic-lsopt", "torchrun", "deepspeed")
ROOM = 1 << 15
"""Bytes of the server's arguments, and of its environment, into which a forked process writes its own."""
MESSAGE_BYTES, DESCRIPTORS = 1 << 17, 64
NAME = b"warm-server"
"""A server's, among the processes of a job."""


@dataclass(frozen=True)
class Start:
    """What a process is to be."""

    arguments: list[str]
    """As Python gets them, its own options left out: `-m MODULE …`, `-c CODE …` or `FILE …`."""
    environment: dict[str, str]
    folder: str
    descriptors: list[int]
    """The numbers that the descriptors which come with the message have in the new process."""
    session: bool
    namespace: str | None
    """A file that names the network namespace."""
    nice: int
    """As who starts it is."""


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` without `preexec_fn`, `shell`, groups and users for what is forked."""

    _line: socket.socket | None = None

    def _execute_child(self, args: Any, *given: Any) -> None:
        executable, preexec_fn, _, pass_fds, cwd, env, _, _, shell = given[:9]
        pipes, session = given[9:15], given[20]
        start = None
        if not (executable or preexec_fn or shell or os.environ.get("LSOPT_TESTS_EXEC")):
            start = start_of(args, dict(os.environ if env is None else env), cwd, [0, 1, 2, *pass_fds], session)
        standard = [number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        if start is None or not self._ask(start, [*standard, *pass_fds]):
            super()._execute_child(args, *given)  # type: ignore[misc]
            return
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _ask(self, start: Start, descriptors: list[int]) -> bool:
        """Whether the server has forked it."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.connect(os.environ.get(ADDRESS) or start_server())
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        line.sendmsg([json.dumps(asdict(start)).encode()], [rights])
        said = json.loads(line.recv(64) or b'{"pid": null}')
        assert said["pid"], "the warm server has ended; what it said stands above"
        self.pid = said["pid"]
        if said["child_of"] == os.getpid() or self.pid < 0:
            line.close()
        else:
            self._line = line
        return self.pid > 0

    def _known(self, timeout_s: float) -> bool:
        """Whether its end is known, at most `timeout_s` later."""
        assert self._line is not None
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None:
                with selectors.DefaultSelector() as selector:
                    selector.register(self._line, selectors.EVENT_READ)
                    if not selector.select(timeout_s):
                        return False
                said = self._line.recv(64)
                self.returncode = int(said) if said else -signal.SIGKILL  # with its server
                self._line.close()
        return True

    def _internal_poll(self, *rest: Any, **more: Any) -> int | None:
        if self._line is None:
            return super()._internal_poll(*rest, **more)  # type: ignore[misc]
        self._known(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._line is None:
            return super()._wait(timeout)  # type: ignore[misc]
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._known(min(0.02, max(0.0, end - time.monotonic()))):  # in turns: another thread may poll
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode


def run(arguments: list[str], *, timeout: float, **more: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text."""
    with Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more) as process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, process.wait(), said, errors)


def start_of(args: Any, environment: dict[str, str], cwd: Any, numbers: list[int], session: bool) -> Start | None:
    """What the server is asked for; None for a command that must be executed."""
    words = [os.fspath(a) for a in ([args] if isinstance(args, str | Path) else args)]
    namespace = None
    if words[0] == "env":
        del words[0]
        while "=" in words[0]:
            name, _, environment[name] = words.pop(0).partition("=")
    if words[0] == "nsenter" and words[1].startswith("--net="):
        namespace = words[1].partition("=")[2]
        del words[:2]
    if Path(words[0]).parent != BIN:
        return None
    if Path(words[0]).name not in SCRIPTS:
        if Path(words[0]).resolve() != Path(sys.executable).resolve():
            return None
        del words[0]
        while words and words[0] in ("-u", "-W"):
            del words[: 1 + (words[0] == "-W")]
        if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
            return None
    return Start(words, environment, os.fspath(cwd or Path.cwd()), numbers, session, namespace, os.nice(0))


_servers: list[subprocess.Popen[bytes]] = []


def start_server() -> str:
    """The address of a server that begins to import now and ends with this process. Cost: 6 s of a core, beside it."""
    from tests.processes.ranks import rank_environment

    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(DESCRIPTORS)  # who asks before all is imported waits here
        _servers.append(subprocess.Popen(
            [sys.executable, "-m", "tests.processes.warm_server", str(listener.fileno()), "x" * ROOM], cwd=ROOT,
            env=rank_environment(
                LSOPT_TESTS_ROOM="x" * ROOM, TORCH_CPP_LOG_LEVEL="FATAL",
                JE_ARROW_MALLOC_CONF="background_thread:false",
                HF_HUB_DISABLE_PROGRESS_BARS="1",
            ),
            pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip
    os.environ[ADDRESS] = address
    return address


def is_server(pid: int) -> bool:
    """Whether this process of a job is only what forks for it."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().strip() == NAME
    except OSError:
        return False
