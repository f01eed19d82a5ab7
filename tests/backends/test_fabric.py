"""A communicator that the fabric makes, breaks and makes anew, with the torch that is installed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from elastic_lsopt.backends.fabric import NCCL, Reconfigured, fabric_for

VERSION = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
NAME = "gloo, reconfigured" if VERSION >= (2, 14) else "gloo"


def test_chosen_by_device_and_torch() -> None:
    assert isinstance(fabric_for("cuda"), NCCL)
    built_with_nccl = hasattr(torch.distributed, "ProcessGroupNCCL2")
    assert fabric_for("cuda").name == ("nccl2, reconfigured" if VERSION >= (2, 14) and built_with_nccl else "nccl")
    assert fabric_for("cpu").name == NAME
    assert Reconfigured.supported() == (VERSION >= (2, 14))


@pytest.mark.parametrize("leaves", ["first", "last"])
@pytest.mark.parametrize("world", [2, 3])
def test_cut_and_formed_without_the_silent_one(ranks: Any, world: int, leaves: str) -> None:
    gone = 0 if leaves == "first" else world - 1
    whole, rest = 2.0**world - 1, 2.0**world - 1 - 2.0**gone
    order = [r for r in range(world) if r != gone] + [gone]
    for rank, r in enumerate(ranks(world).run("tests.cases.elastic.reforming:cut_and_formed", leaves=gone)):
        assert r["name"] == NAME and r["sum"] == r["beside"] == whole and r["error"] == "", (rank, r)
        assert r["in the end"] == [order.index(rank), whole], (rank, r)
        if rank != gone:
            # The group would wait for 30 s.
            assert r["raised"] and r["seconds"] < 10 and r["then"] == rest, (rank, r)
