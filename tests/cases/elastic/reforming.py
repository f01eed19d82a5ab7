"""Groups that the device's own fabric makes, breaks and makes anew, in place of the harness's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic_lsopt.backends.fabric import fabric_for
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.backends.transport import Transport
from tests.cases import engines

TIMEOUT = timedelta(seconds=30)
_formed = {"groups": 0}


@contextmanager
def reforming() -> Iterator[Any]:
    """`form(members)`: the members' ranks are their places in the list. The harness's group comes back in the end."""
    store = dist.distributed_c10d._get_default_store()
    me, world = dist.get_rank(), dist.get_world_size()

    def form(members: Sequence[int]) -> bool:
        """Whether this process is one of the new group's."""
        _formed["groups"] += 1
        if me not in members:
            return False
        place = dist.PrefixStore(f"formed/{_formed['groups']}", store)
        form_group(fabric_for(engines.DEVICE.type), place, list(members).index(me), len(members), TIMEOUT)
        return True

    tear_down(None)
    try:
        yield form
    finally:
        if dist.is_initialized():
            tear_down(None)
        form(range(world))


def sum_of(value: float, group: dist.ProcessGroup | None = None) -> float:
    on = torch.device("cpu") if group is not None else engines.DEVICE
    x = torch.tensor([value], dtype=torch.float64, device=on)
    dist.all_reduce(x, group=group)
    return x.item()


def cut_and_formed(leaves: int) -> dict[str, Any]:
    """All form a group; the rank `leaves` keeps silent while the others wait for it, and cut; these form another."""
    me, world = dist.get_rank(), dist.get_world_size()
    staying = [r for r in range(world) if r != leaves]
    out: dict[str, Any] = {}
    with reforming() as form:
        form(range(world))
        transport = Transport()
        store = dist.distributed_c10d._get_default_store()
        out |= {"name": transport.fabric.name, "sum": sum_of(2.0**me)}
        out["beside"] = sum_of(2.0**me, transport.fabric.group(TIMEOUT))
        out["error"] = transport.fabric.error()
        if me == leaves:
            store.wait([f"raised/{r}" for r in staying], TIMEOUT)
        else:
            begin = time.monotonic()
            threading.Timer(0.3, transport.sever).start()
            try:
                sum_of(0.0)
                out["raised"] = ""
            except RuntimeError as error:
                out["raised"] = type(error).__name__
            out["seconds"] = time.monotonic() - begin
            store.set(f"raised/{me}", "")
        tear_down(None)
        if form(staying):
            out["then"] = sum_of(2.0**me)
            tear_down(None)
        form([*staying, leaves])
        out["in the end"] = [dist.get_rank(), sum_of(2.0**me)]
    return out
