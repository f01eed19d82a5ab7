"""One process a rank, started by torchrun as a user would, and what rank 0 measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800


def world() -> int:
    """Two ranks on a CPU, one a device on GPUs."""
    import torch

    return torch.cuda.device_count() or 2


def on_ranks(
    case: str, *, processes: int | None = None, before: Callable[[], None] | None = None, **arguments: Any
) -> Any:
    """Rank 0's result of `module:function(**arguments)`, run on all ranks (`processes`, or `world()`) in one group.

    `before` runs in the launcher before it starts, which so may put itself under a limit.
    One thread a rank on a CPU, so that ranks do not fight for cores. Raises CalledProcessError with the ranks' own
    output on standard error where one fails, TimeoutExpired after half an hour.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        order = json.dumps({"case": case, "arguments": arguments, "answer": str(answer)})
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes or world()}",
        ]
        subprocess.run(
            [*launcher, "-m", "benchmarks.workers", order],
            cwd=ROOT, env=environment, stdout=sys.stderr, timeout=TIMEOUT_S, check=True,
            preexec_fn=before,
        )  # fmt: skip
        return json.loads(answer.read_text())


def main() -> None:
    """One rank of `on_ranks`."""
    import torch
    import torch.distributed as dist

    order = json.loads(sys.argv[1])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    module, function = order["case"].split(":")
    result = getattr(importlib.import_module(module), function)(**order["arguments"])
    if dist.get_rank() == 0:
        Path(order["answer"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
