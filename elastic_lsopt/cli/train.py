"""`elastic-lsopt train`: under a launcher this process is one rank; without one it starts the workers itself."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from elastic_lsopt.cli.job import read_job
from elastic_lsopt.cli.validate import check_paths
from elastic_lsopt.errors import UserError


def train(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Run the job; returns the exit code. Raises UserError, before a worker starts, for a wrong file."""
    from elastic_lsopt.training.world import launched, start_workers

    job = read_job(path, overrides)
    with job.file.located():
        check_paths(job.config)
    if not launched() and job.config.workers > 1:
        return start_workers(job.config.workers, [str(path), *overrides])
    return _one_rank(path, overrides)


def _one_rank(path: str | Path, overrides: Sequence[str]) -> int:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.basicConfig(format="elastic-lsopt: %(message)s", level=logging.WARNING)
    from elastic_lsopt.training.loop import train as run
    from elastic_lsopt.training.world import join

    job = read_job(path, overrides)
    world = join()
    logging.getLogger("elastic_lsopt").setLevel(logging.INFO if world.is_first else logging.ERROR)
    code = 1
    try:
        with job.file.located():
            run(job.config, job.method, world)
        code = 0
    except UserError as error:
        if world.is_first:
            print(f"elastic-lsopt: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        # One write a rank, so that the ranks' tracebacks do not run into each other.
        sys.stderr.write("".join([f"rank {world.rank}:\n", traceback.format_exc()]))
    return _leave(code, world.size)


def _leave(code: int, world: int) -> int:
    """End the process group; after a failure leave at once, because its peers may be gone or wait in a collective."""
    import torch.distributed as dist

    sys.stdout.flush()
    sys.stderr.flush()
    if code and world > 1:
        os._exit(code)
    dist.destroy_process_group()
    return code
