"""Processes that start in a tenth of a second: forked from one that has imported torch, DeepSpeed and transformers.

Imports cost a new Python 2 to 6 s of a core, and a test that starts a job pays them for each agent and each worker.
`Popen` is `subprocess.Popen`, and starts what would be a new Python of this environment by a fork of the warm server.
Whatever else it is given, it executes. `LSOPT_TESTS_EXEC=1` executes everything.

[Note: what a forked process has] Its own arguments and environment (in /proc too), working folder, session,
descriptors, network namespace and random numbers, and an end through the interpreter's own exit. What a fork can't
change is what imports have read from the environment (AT_IMPORT): where that differs, the process is executed. A forked
process has a server of its own as a child, NAME, made while it has one thread, and its `subprocess.Popen` is the one of
this file. What that server forks it gives to its parent (`_given_away`), so workers are children of who starts them:
they are waited for, know their parent and end with it as if it had forked them itself.

[Note: one thread] A fork copies the calling thread alone, so whatever another holds is locked for ever in the child.
The server never has a store, a group or a thread, and ends with an error if an import should start one.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "LSOPT_TESTS_WARM"
"""Names the socket of the server that forks for this process."""
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = ("elastic-lsopt", "torchrun", "deepspeed")
AT_IMPORT = (
    "PYTHON", "OMP_NUM_THREADS", "HF_", "TRANSFORMERS_", "DS_ACCELERATOR",
    "TRITON_", "CUDA_VISIBLE_DEVICES", "COVERAGE_",
)  # fmt: skip
MODULES = (
    "numpy", "scipy.stats", "sklearn.datasets", "matplotlib.pyplot", "datasets", "torch.distributed.run",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard", "deepspeed", "setuptools",
    "torch.profiler._cupti_monitor", "torch._inductor.compile_fx", "deepspeed.runtime.superoffload.superoffload_stage3",
    "transformers.trainer", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip
ROOM = 1 << 15
"""Bytes of the server's arguments, and of its environment, into which a forked process writes its own."""
MESSAGE_BYTES, DESCRIPTORS = 1 << 17, 64
NAME = b"warm-server"
"""A server's, among the processes of a job."""
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_CLONE_NEWNET = 0x40000000


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


# -- the client --------------------------------------------------------------------------------------------------------


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
    return Start(words, environment, os.fspath(cwd or Path.cwd()), numbers, session, namespace)


_servers: list[subprocess.Popen[bytes]] = []


def start_server() -> str:
    """The address of a server that begins to import now and ends with this process. Cost: 6 s of a core, beside it."""
    from tests.ranks import rank_environment

    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(DESCRIPTORS)  # who asks before all is imported waits here
        _servers.append(subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(listener.fileno()), "x" * ROOM], cwd=ROOT,
            env=rank_environment(
                LSOPT_TESTS_ROOM="x" * ROOM, TORCH_CPP_LOG_LEVEL="FATAL", JE_ARROW_MALLOC_CONF="background_thread:false"
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


# -- the server --------------------------------------------------------------------------------------------------------


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(AT_IMPORT)}


def serve(
    listener: socket.socket, imported_with: Mapping[str, str], parent: int | None = None
) -> tuple[Start, list[int]]:
    """Fork for those who ask; returns in the forked process, with the descriptors that it is given. Never returns in
    the server, which the kernel ends with its parent. What it forks is a child of `parent`, or else of the server,
    which tells who asked how it ended."""
    children: dict[int, tuple[int, socket.socket]] = {}
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd in children:  # has ended
                pid, line = children.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                with suppress(OSError):
                    line.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                line.close()
                continue
            line, _ = listener.accept()
            message, rights, _, _ = line.recvmsg(
                MESSAGE_BYTES, socket.CMSG_SPACE(DESCRIPTORS * array.array("i").itemsize)
            )
            descriptors = array.array("i", b"".join(data for _, _, data in rights)).tolist()
            start = Start(**json.loads(message))
            pid = -1
            if read_at_import(start.environment) != imported_with:
                _answer(line, -1, None)
            elif (pid := os.fork()) == 0:
                if parent is None:
                    _answer(line, os.getpid(), os.getppid())
                else:
                    _given_away(parent)
                    _answer(line, os.getpid(), parent)
                for ours in (selector, listener, line, *(other for _, other in children.values())):
                    ours.close()
                for handle in children:
                    os.close(handle)
                return start, descriptors
            for theirs in descriptors:
                os.close(theirs)
            if pid > 0 and parent is None:
                handle = os.pidfd_open(pid)
                children[handle] = pid, line
                selector.register(handle, selectors.EVENT_READ)
            else:
                line.close()
                if pid > 0:
                    os.waitpid(pid, 0)


def _answer(line: socket.socket, pid: int, parent: int | None) -> None:
    line.send(json.dumps({"pid": pid, "child_of": parent}).encode())


def _given_away(parent: int) -> None:
    """Become a child of `parent`, to whom the kernel gives orphans (`own_server`): by an orphan's fork."""
    if os.fork():
        os._exit(0)
    while os.getppid() != parent:
        time.sleep(0.0005)


def become(start: Start, descriptors: list[int]) -> None:
    """Make this process what was asked for. See [Note: what a forked process has]."""
    if start.session:
        os.setsid()
    above = max(256, *start.descriptors) + 1
    held = [fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, above) for d in descriptors]
    for theirs in descriptors:
        os.close(theirs)
    for theirs, number in zip(held, start.descriptors, strict=True):
        os.dup2(theirs, number, inheritable=True)
        os.close(theirs)
    if start.namespace is not None:
        with open(start.namespace) as space:
            assert ctypes.CDLL(None).setns(space.fileno(), _CLONE_NEWNET) == 0, start.namespace
    os.chdir(start.folder)
    os.environ.clear()  # each variable: C holds none of the texts below any longer
    os.environ.update(start.environment)
    _show([sys.executable, *start.arguments], [f"{k}={v}" for k, v in start.environment.items()])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _prctl(_PR_SET_NAME, b"python")
    random.seed()
    sys.modules["numpy"].random.seed()


def _show(*texts: list[str]) -> None:
    """Write arguments and environment over those that the server was started with, which /proc shows."""
    fields = [int(f) for f in Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[45:49]]
    for (begin, end), lines in zip((fields[:2], fields[2:]), texts, strict=True):
        text = b"".join(line.encode() + b"\0" for line in lines)[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def own_server(start: Start, imported_with: Mapping[str, str], folder: Path) -> tuple[Start, list[int]] | None:
    """Give this process a server as a child: None in the process, and in what the child forks what that is to be."""
    address, parent = str(folder / f"of-{os.getpid()}"), os.getpid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(DESCRIPTORS)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.fork() == 0:
        _end_with(parent)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a test may send to all that its job has started
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in start.descriptors:
            os.dup2(nothing, number)
        return serve(listener, imported_with, parent)
    listener.close()
    os.environ[ADDRESS] = address
    subprocess.Popen = Popen  # type: ignore[misc]
    return None


def _end_with(parent: int) -> None:
    """A server ends with whom it serves."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    _prctl(_PR_SET_NAME, NAME)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prctl(option: int, value: Any) -> None:
    assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def execute(arguments: list[str], folder: str) -> None:
    """As Python runs it."""
    first, *rest = arguments
    sys.orig_argv = [sys.executable, *arguments]
    if first == "-m":
        sys.path[0], sys.argv = folder, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), arguments
        runpy.run_path(first, run_name="__main__")


def warm() -> None:
    import elastic_lsopt

    own = {m.name for m in pkgutil.walk_packages(elastic_lsopt.__path__, "elastic_lsopt.")}
    own -= {f"elastic_lsopt.{name}" for name in ("__main__", "agent", "train", "space.noise_triton")}
    for name in [*MODULES, *sorted(own)]:
        importlib.import_module(name)


def main() -> None:
    """The server: `python -m tests.warm SOCKET ROOM`."""
    _end_with(os.getppid())
    warnings.filterwarnings("ignore")
    imported_with = read_at_import(os.environ)
    listener = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(listener.getsockname()).parent
    warm()
    threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        raise SystemExit(f"an import has started a thread, beside which nothing can be forked: {threads}")
    gc.collect()
    gc.freeze()
    asked = serve(listener, imported_with)
    while asked:
        start, descriptors = asked
        become(start, descriptors)
        asked = own_server(start, imported_with, folder) if "ELASTIC_LSOPT_WORKER" not in start.environment else None
    atexit.register(gc.unfreeze)  # else libraries that count what is left at the end (nanobind) report all of theirs
    execute(start.arguments, start.folder)


if __name__ == "__main__":
    main()
