"""Has imported everything and forks what tests start: `python -m tests.processes.warm_server SOCKET ROOM`.

[Note: what a forked process has] Its own arguments and environment (in /proc too), working folder, session,
descriptors, network namespace and random numbers. What a fork can't change is what imports have read from the
environment (AT_IMPORT): where that differs, the process is executed. A forked process has a server of its own as a
child, NAME, made while it has one thread, and `subprocess.Popen` is that of warm.py beside this. What that server forks
it gives to its parent (`_given_away`), so workers are children of who starts them: they are waited for, know their
parent and end with it as if it had forked them itself.

[Note: one thread] A fork copies the calling thread alone, so whatever another holds is locked for ever in the child.
The server never has a store, a group or a thread, and ends with an error if an import should start one.

[Note: how a forked process ends] As Python does, up to its exit handlers; then at once. Taking apart all the modules
that its server has imported costs 2.6 s of a core, because each object that is touched is copied first.
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
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.processes.warm import ADDRESS, DESCRIPTORS, MESSAGE_BYTES, NAME, Popen, Start

AT_IMPORT = (
    "PYTHON", "OMP_NUM_THREADS", "HF_", "TRANSFORMERS_", "DS_ACCELERATOR",
    "TRITON_", "COVERAGE_",
)  # fmt: skip
QUIET = "HF_HUB_DISABLE_PROGRESS_BARS"
"""Set in the server, and by this package in each process that starts others: so it tells nothing."""
MODULES = (
    "numpy", "scipy.stats", "sklearn.datasets", "matplotlib.pyplot", "datasets", "torch.distributed.run",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard", "deepspeed", "setuptools",
    "torch.profiler._cupti_monitor", "torch._inductor.compile_fx", "deepspeed.runtime.superoffload.superoffload_stage3",
    "transformers.trainer", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip
WORKER = "ELASTIC_LSOPT_WORKER"
"""In the environment of an elastic job's worker."""
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_CLONE_NEWNET = 0x40000000


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(AT_IMPORT) and k != QUIET}


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
    os.nice(start.nice - os.nice(0))
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


def starts_nothing(start: Start) -> bool:
    """A worker, or a rank that is no agent: it need not have a server of its own."""
    return WORKER in start.environment or ("RANK" in start.environment and "elastic_lsopt.agent" not in start.arguments)


def end(start: Start) -> NoReturn:
    """Execute it and end with its exit code. See [Note: how a forked process ends]."""
    code = 0
    try:
        execute(start.arguments, start.folder)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code != error.code and error.code is not None:
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def warm() -> None:
    import elastic_lsopt

    own = {m.name for m in pkgutil.walk_packages(elastic_lsopt.__path__, "elastic_lsopt.")}
    own -= {f"elastic_lsopt.{name}" for name in ("__main__", "agent", "train", "space.random.noise_triton")}
    for name in MODULES:
        with suppress(ModuleNotFoundError):  # another version of a library has others
            importlib.import_module(name)
    for name in sorted(own):
        importlib.import_module(name)


def main() -> None:
    _end_with(os.getppid())
    warnings.filterwarnings("ignore")
    imported_with = read_at_import(os.environ)
    listener = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(listener.getsockname()).parent
    subprocess.Popen = Popen  # type: ignore[misc]  # before a launcher is imported, which takes the name
    warm()
    threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        raise SystemExit(f"an import has started a thread, beside which nothing can be forked: {threads}")
    gc.collect()
    gc.freeze()
    start, descriptors = serve(listener, imported_with)
    become(start, descriptors)
    while not starts_nothing(start) and (asked := own_server(start, imported_with, folder)):
        start, descriptors = asked
        become(start, descriptors)
    if starts_nothing(start):
        os.environ["LSOPT_TESTS_EXEC"] = "1"  # it has no server
    end(start)


if __name__ == "__main__":
    main()
