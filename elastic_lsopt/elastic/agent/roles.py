"""One program, two roles: started by a person or a launcher it is the node's agent; started by the agent, a worker.

lso.elastic.run(build, "job.yaml")            # or an ElasticConfig; `build(world)` returns lso.elastic.Job
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import elastic_lsopt
from elastic_lsopt.backends.fabric.ending import leave
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent.agent import Agent
from elastic_lsopt.elastic.agent.endpoint import ENDPOINT, JOB, endpoint_by_mpi
from elastic_lsopt.elastic.agent.node import Node
from elastic_lsopt.elastic.agent.node_folder import NodeFolder
from elastic_lsopt.elastic.mail.mailbox import HERE, silence_torch
from elastic_lsopt.elastic.mail.signing import job_secret
from elastic_lsopt.elastic.membership.machine import Rules
from elastic_lsopt.elastic.worker.journal import Journal
from elastic_lsopt.elastic.worker.link import WorkerLink, is_worker
from elastic_lsopt.elastic.worker.open_files import make_room, too_few
from elastic_lsopt.errors import UserError
from elastic_lsopt.plan import Policy
from elastic_lsopt.schedules.batch_scaling import Hyperparameters

if TYPE_CHECKING:
    from elastic_lsopt.elastic.worker.runtime import Build

log = logging.getLogger("elastic_lsopt")
BEATS_PER_TIMEOUT = 10
LONGEST_BEAT_S = 1.0
NODE = "ELASTIC_LSOPT_NODE"
"""Names a node where the host's name does not, as for several agents on one machine."""


def work(build: Build, settings: ElasticConfig, policy: Policy, journal: Journal) -> NoReturn:
    """The life of this worker; ends the process. What is its own mistake is told to the agent, in one line."""
    from elastic_lsopt.elastic.worker.runtime import Runtime

    link = WorkerLink(min(settings.hang_timeout_s / BEATS_PER_TIMEOUT, LONGEST_BEAT_S))
    runtime = Runtime(build, settings, policy, journal, link)
    try:
        runtime.main()
    except UserError as error:
        link.tell("failed", error=" ".join(str(error).split()))
        leave(2)  # peers may wait in a collective, and are told by the end of this process
    except BaseException:
        import traceback

        sys.stderr.write(f"worker {link.name}:\n{traceback.format_exc()}")
        leave(1)
    leave(0)  # gloo's threads need not be waited for


def serve(
    settings: ElasticConfig, run_folder: Path, *, workers: int, command: Sequence[str], fingerprint: Mapping[str, str],
    exit_code_when_stopped: int = 0, replicas: int = 1,
) -> NoReturn:  # fmt: skip
    """The life of this node's agent; ends the process with its exit code.

    Raises UserError for a wrong address or secret, and for more replicas than there can be workers.
    """
    _log_to_stderr()
    if replicas > settings.max_nodes * workers:
        raise UserError(
            f"replicas={replicas} need a worker each, but max_nodes={settings.max_nodes} nodes of workers={workers} "
            f"have {settings.max_nodes * workers}; raise one of them, or take fewer replicas."
        )
    if wrong := too_few(settings.max_nodes * workers, make_room()):
        log.warning("elastic.max_nodes=%d of %d workers: %s", settings.max_nodes, workers, wrong)
    endpoint = settings.endpoint or _endpoint_of_launcher()
    address = settings.address or (_own_address(endpoint) if endpoint else HERE)
    folder = NodeFolder(run_folder, os.environ.get(NODE) or socket.gethostname())
    rules = Rules(
        min_nodes=settings.min_nodes, max_nodes=settings.max_nodes, lease_s=settings.lease_s,
        join_debounce_s=settings.join_debounce_s, witness=settings.witness, job=_job(run_folder),
        fingerprint={**fingerprint, "replicas": str(replicas)}, replicas=replicas,
    )  # fmt: skip
    node = Node(
        folder=folder, rules=rules, settings=settings, secret=job_secret(settings.secret_file, run_folder),
        endpoint=endpoint, address=address if ":" in address else f"{address}:0", workers=workers, command=command,
        environment=_environment(workers), exit_code_when_stopped=exit_code_when_stopped,
    )  # fmt: skip
    silence_torch()
    leave(Agent(node).main())  # threads may wait in the network for ever


def _log_to_stderr() -> None:
    """The agent's warnings as lines; on a terminal they take the place of rank 0's bar until it is redrawn."""
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter(("\r\x1b[2K" if sys.stderr.isatty() else "") + "%(message)s"))
    log.handlers, log.propagate = [lines], False


def fingerprint_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all nodes: versions, this package's own source, every key of the configuration."""
    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    source = hashlib.sha256()
    for file in sorted(Path(elastic_lsopt.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    found["elastic_lsopt"] = source.hexdigest()[:16]
    return found | {f"config.{key}": str(value) for key, value in sorted(config.items())}


def _job(run_folder: Path) -> str:
    """The job's id: torchrun's, or the run folder's name."""
    given = os.environ.get(JOB) or os.environ.get("TORCHELASTIC_RUN_ID")
    return given if given and given != "none" else run_folder.resolve().name


def _endpoint_of_launcher() -> str | None:
    """What torchrun (by our rendezvous), deepspeed or mpirun says of the first node."""
    if given := os.environ.get(ENDPOINT):
        return given
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return endpoint_by_mpi()
    return None


def _own_address(endpoint: str) -> str:
    """This machine's address as the endpoint's network sees it."""
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port) or 1))  # a datagram socket sends nothing by that
        except OSError as error:
            raise UserError(
                f"elastic.endpoint={endpoint}: no way to {host}: {error.strerror}; check the name."
            ) from None
        return probe.getsockname()[0]


def _environment(workers: int) -> dict[str, str]:
    """Of a worker: this process's, without what a launcher has said of this process's own place."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    launchers = ("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "PRTE_")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith(launchers)}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return {**kept, "OMP_NUM_THREADS": threads, "LOCAL_WORLD_SIZE": str(workers), "TORCH_CPP_LOG_LEVEL": "FATAL"}


def run(
    build: Build, config: ElasticConfig | Mapping[str, Any], *, reference: Hyperparameters, microbatch_size: int,
    output_dir: str | Path, workers: int = 1, replicas: int = 1,
) -> NoReturn:  # fmt: skip
    """Run `build`'s training elastically, and end the process (0: done, or this node has left as it was asked to).

    The same program is this node's agent and, started again by it, each of the node's workers; what stands before this
    call runs in all of them. `build(world)` makes engine and data for one generation and returns a `Job`. `reference`
    says the global batch and the peak rate (under scale_batch also Adam's betas) that the job was tuned for;
    `microbatch_size` is the number of samples in a micro-batch. `workers` are this node's. With `replicas` the job's
    workers are dealt into so many groups, each of which is a world of its own (`world.replica` says which), goes on
    whatever becomes of the others, and takes `reference` for itself; the job ends when all have ended. Raises
    ValueError for settings that contradict each other.
    """
    settings = config if isinstance(config, ElasticConfig) else ElasticConfig(**config)
    policy, folder = _policy(settings, reference, microbatch_size), Path(output_dir)
    if is_worker():
        work(build, settings, policy, Journal(folder, lambda line: print(line, file=sys.stderr, flush=True)))
    try:
        serve(
            settings, folder, workers=workers, command=[sys.executable, *sys.orig_argv[1:]],
            fingerprint=fingerprint_of({"policy": asdict(policy)}), replicas=replicas,
        )  # fmt: skip
    except UserError as error:
        sys.exit(f"elastic-lsopt: {' '.join(str(error).split())}")


def _policy(settings: ElasticConfig, reference: Hyperparameters, microbatch_size: int) -> Policy:
    own = "linear" if reference.betas is None else "sqrt"
    bounds = ("min_global_batch_size", "max_global_batch_size", "min_learning_rate", "max_learning_rate")
    return Policy(
        reference=reference, microbatch_size=microbatch_size, kind=settings.policy,
        reference_workers=settings.reference_workers,
        rule="none" if settings.policy == "keep_batch" else settings.lr_rule or own,
        ramp_samples=settings.ramp_samples, max_accumulation=settings.max_accumulation,
        **{name: getattr(settings, name) for name in bounds},
    )  # fmt: skip
