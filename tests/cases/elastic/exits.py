"""Pairs of ranks, forked from one warm process, each of which ends as a user's script does: by its last line.

python -m tests.cases.elastic.exits PAIRS        prints how many exits had which exit code, as JSON
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import elastic_lsopt as lso
from tests.processes.ranks import free_port

WORLD = 2


def steps() -> object:
    """Three steps of a user's own loop under FSDP2; whatever must live until the last line."""
    dist.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = lso.LandscapeOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), lso.SAM(rho=0.05))
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return optimizer


def start_pair() -> list[int]:
    """The process ids of two ranks; [] in a rank itself."""
    port = str(free_port())
    ranks = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            return []
        ranks.append(pid)
    return ranks


if __name__ == "__main__":
    gc.freeze()  # else each child's first collection copies the parent's memory
    codes: Counter[int] = Counter()
    kept = None
    for _ in range(int(sys.argv[1])):
        ranks = start_pair()
        if not ranks:
            kept = steps()
            break
        codes.update(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)
    else:
        print(json.dumps(codes))
