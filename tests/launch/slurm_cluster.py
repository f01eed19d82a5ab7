"""A Slurm cluster on this machine: munged, slurmctld and a slurmd a node, in a temporary folder, on ports of their own.

The nodes are called 127.0.0.1, 127.0.0.2, …: names that every machine resolves. Whoever runs it is its only user, root
or not; nothing in /etc is read or written.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import BIN
from tests.processes.ranks import ROOT, free_port, rank_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{BIN}:{os.environ['PATH']}:/usr/sbin"
START_S, END_S = 60.0, 60.0
REQUEUE_S = 10
"""How long a job that is queued again waits at least, and how long a credential is good for; Slurm's default is 120."""
GRACE_S = 60
"""What a preempted job has to save its state."""
LOST_S = 15
"""After which a machine that does not answer is lost."""
CONF = """
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=60
SlurmdTimeout={lost_s}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
NodeName={nodes} NodeAddr=127.0.0.1 Port={ports} CPUs=4
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here, None where it can run."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"this machine lacks {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else None


@dataclass(frozen=True)
class SlurmJob:
    """A batch job; `log` is what it and its steps have said."""

    slurm: Slurm
    number: str
    log: Path

    def shown(self, key: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts, NumNodes or ExitCode."""
        words = self.slurm.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    def until(self, reached: Callable[[], bool], limit_s: float = 180.0) -> None:
        """Wait for it."""
        end = time.monotonic() + limit_s
        while not reached():
            assert time.monotonic() < end, f"{self.shown('JobState')}: {self.log.read_text()}"
            time.sleep(0.3)

    def wait(self) -> str:
        """Its state once it is at its end, and runs nowhere any more."""
        running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")
        self.until(
            lambda: self.shown("JobState") not in running and self.slurm.call("squeue", "-hj", self.number) == ""
        )
        return self.shown("JobState")


class Slurm:
    """A cluster that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slurmd = folder, dict[str, subprocess.Popen[bytes]]()
        self._environment = rank_environment(PATH=PATH, SLURM_CONF=str(folder / "slurm.conf"))

    def call(self, *command: str) -> str:
        """What a program of Slurm's says; raises AssertionError where it fails."""
        done = self._run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def leave(self, step: str) -> None:
        """SIGTERM to a step; scancel 22.05 sends it, and says nevertheless that it knows no such job."""
        self._run("scancel", "--signal=TERM", step)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )

    def lose(self, node: str) -> None:
        """As if the machine had lost its power: its slurmd ends, then whoever runs a step there, then the steps."""
        self.slurmd[node].kill()
        tasks = [pid for pid in _pids() if f"SLURMD_NODENAME={node}".encode() in _environment(pid)]
        parents = {_parent(pid) for pid in tasks} - set(tasks)
        for pid in [*parents, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def submit(self, script: str, *arguments: str, options: Sequence[str] = ()) -> SlurmJob:
        """`sbatch OPTIONS SCRIPT ARGUMENTS`, as a user types it in the repository's folder."""
        log = self.folder / f"output-{time.monotonic_ns()}.txt"
        log.touch()
        number = self.call("sbatch", "--parsable", f"--output={log}", *options, script, *arguments)
        return SlurmJob(self, number, log)


@contextmanager
def slurm(nodes: int = 3) -> Iterator[Slurm]:
    """A cluster whose nodes are idle; whatever it has started ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: that of a socket has 107 bytes at most
    cluster, daemons = Slurm(folder), list[subprocess.Popen[bytes]]()
    try:
        _configure(folder, nodes)
        munge, conf = folder / "munge", f"{folder}/slurm.conf"
        daemons.append(_daemon(
            folder, "munged", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log",
        ))  # fmt: skip
        daemons.append(_daemon(folder, "slurmctld", "-D", "-f", conf))
        for node in range(1, nodes + 1):
            name = f"127.0.0.{node}"
            cluster.slurmd[name] = _daemon(folder, "slurmd", "-D", "-N", name, "-f", conf)
            daemons.append(cluster.slurmd[name])
        _until(lambda: _idle(cluster) == nodes, START_S, folder)
        yield cluster
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.call("scancel", "--full", "--signal=KILL", "--me")
            cluster.call("scancel", "--me")
            _until(lambda: cluster.call("squeue", "--noheader") == "", END_S, folder)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()
        _kill_what_says(f"SLURM_CONF={folder}/slurm.conf")
        shutil.rmtree(folder)


def _configure(folder: Path, nodes: int) -> None:
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o700)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o711)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    ports = [free_port() for _ in range(nodes)]
    conf = CONF.format(
        user=getpass.getuser(), port=free_port(), folder=folder, requeue_s=REQUEUE_S, grace_s=GRACE_S, lost_s=LOST_S,
        nodes=",".join(f"127.0.0.{n}" for n in range(1, nodes + 1)), ports=",".join(map(str, ports)),
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf)


def _daemon(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    program = shutil.which(name, path=PATH)
    assert program is not None
    with (folder / "daemons.txt").open("ab") as log:
        return subprocess.Popen([program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _idle(cluster: Slurm) -> int:
    with suppress(AssertionError):  # the controller does not answer yet
        return cluster.call("sinfo", "--noheader", "--partition=usual", "--states=idle", "--Node").count("\n") + 1
    return 0


def _until(reached: Callable[[], bool], limit_s: float, folder: Path) -> None:
    end = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < end, (folder / "daemons.txt").read_text()
        time.sleep(0.3)


def _kill_what_says(variable: str) -> None:
    """Steps of a job that the daemons have left."""
    for pid in _pids():
        if pid != os.getpid() and variable.encode() in _environment(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    with suppress(OSError):  # it has ended, or is another user's
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
