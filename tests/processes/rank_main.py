"""One rank: reads a case a line from standard input, runs it, answers a line on standard output."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
import warnings

PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # else one that is stopped would stay for ever
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a case prints goes to the log
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if os.environ.get("TESTS_ON") == "cuda":
        torch.cuda.set_device(0)  # of two ranks, too: NCCL takes one a device, so they talk by gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if os.environ["WORLD_SIZE"] == "1" else "gloo")
    else:
        dist.init_process_group("gloo")
    for line in sys.stdin:
        order = json.loads(line)
        module, function = order["case"].split(":")
        torch.manual_seed(0)
        try:
            result = getattr(importlib.import_module(module), function)(**order["arguments"])
            answer = {"result": result}
        except BaseException:
            answer = {"error": "raised\n" + traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
