"""`elastic-lsopt train`: under a launcher this process is one rank; without one it starts the workers itself."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from elastic_lsopt.cli.job_file import Job, read_job
from elastic_lsopt.cli.validate import check_paths
from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.errors import UserError

if TYPE_CHECKING:
    from elastic_lsopt.world import World

SAY_S = 5.0
"""How long a rank that has failed stays for the others to say what they have to: launchers end all at the first end."""
USAGE = "usage: "
"""Before a user's mistake in what the ranks tell each other; see training/processes.py [Note: who says what went
wrong]."""


def train(path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> int:
    """Run the job; returns the exit code. Raises UserError, before a worker starts, for a wrong file.

    Without `trust` settings in a run's folder that name code are refused: a run's folder may be somebody else's.
    """
    from elastic_lsopt.training.building.imported_model import of_a_run, refuse_untrusted
    from elastic_lsopt.training.processes import launched, start_workers

    try:
        trusted = trust or not of_a_run(Path(path))
        job = read_job(path, overrides, imports=trusted)
        with job.file.located():
            check_paths(job.config)
        refuse_untrusted(job.config, Path(path), trust=trusted)
    except UserError:
        if launched() and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SAY_S)  # a neighbour reads the same file and says it, which this rank's end would cut short
            return 2
        raise
    arguments = [str(path), *overrides, *(["--trust"] if trust else [])]
    if job.config.elastic is not None:
        _elastic(job, arguments)
    if not launched() and job.config.workers > 1:
        return start_workers(job.config.workers, arguments, replicas=_replicas(job))
    return _one_rank(job)


def agent(path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> int:
    """Be this node's agent; returns the exit code. Raises UserError for a file without an elastic block."""
    if read_job(path, overrides, imports=False).config.elastic is None:
        raise UserError(f"{path} has no elastic block, so there is nothing for an agent to do; add one, or use train.")
    return train(path, overrides, trust=trust)


def _elastic(job: Job, arguments: Sequence[str]) -> NoReturn:
    """This process is its node's agent, or a worker that the agent has started with the same arguments."""
    from elastic_lsopt.elastic.worker.link import is_worker
    from elastic_lsopt.training.reporting.quiet import silence_libraries

    silence_libraries()
    from elastic_lsopt.training.elastic_job import run_agent, run_worker

    if is_worker():
        run_worker(job.config, job.method)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"an elastic job has one agent a node, which starts the node's workers itself, but the launcher starts "
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on this node; use --nproc-per-node=1 (torchrun) or "
            "--num_gpus=1 (deepspeed), and `workers:` for the number of workers a node."
        )
    if job.config.resume_from_checkpoint == "none":
        raise UserError(
            "resume_from_checkpoint=none is refused in an elastic job, where a node that starts again must not begin "
            "anew; use auto, and another output_dir for another run."
        )
    run_agent(job.config, arguments)


def _one_rank(job: Job) -> int:
    from elastic_lsopt.training.reporting.quiet import silence_libraries

    silence_libraries()
    from elastic_lsopt.training.processes import join
    from elastic_lsopt.training.train import train as run

    try:
        world = join(_replicas(job))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"elastic-lsopt: {error}", file=sys.stderr)
        return 2
    try:
        with job.file.located():
            ended = run(job.config, job.method, world)
        code = job.config.exit_code_when_stopped if ended.stopped else 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = say_failure(error, world)
    return leave(code, world.size)


def _replicas(job: Job) -> int:
    block = job.config.consensus
    return 1 if block is None else read_consensus(block).replicas


def say_failure(error: Exception, world: World) -> int:
    """Tell a failure as far as no other rank has; returns the exit code, 2 for a user's mistake and its followers."""
    code = _say(error, world)
    world.wait_for_the_others_words(SAY_S)
    return code


def _say(error: Exception, world: World) -> int:
    if isinstance(error, UserError):
        line = " ".join(str(error).split())
        mine = f"{USAGE}{world.replica}.{world.rank} {line}"
        first = world.first_failure(mine)
        # Another replica's is another mistake, if it reads otherwise.
        other = world.is_first and not first.startswith(f"{USAGE}{world.replica}.") and not first.endswith(line)
        if first == mine or other:
            print(f"elastic-lsopt: {line}", file=sys.stderr)
        return 2
    if world.first_failure(f"rank {world.rank}").startswith(USAGE):
        return 2
    # One write a rank, so that the ranks' tracebacks do not run into each other.
    sys.stderr.write("".join([f"rank {world.rank}:\n", traceback.format_exc()]))
    return 1


def leave(code: int, world: int) -> int:
    """End the process group; after a failure leave at once, because its peers may be gone or wait in a collective."""
    import torch.distributed as dist

    from elastic_lsopt.backends.fabric import ending

    if code and world > 1:
        ending.leave(code)
    dist.destroy_process_group()
    return code
