"""Cases for the test of the harness."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def sum_of_ranks() -> float:
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return x.item()


def break_rank_1(how: str) -> float:
    if dist.get_rank() == 1:
        match how:
            case "raise":
                raise ValueError("oh dear")
            case "hang":
                time.sleep(60)
            case _:
                os._exit(3)
    return sum_of_ranks()
