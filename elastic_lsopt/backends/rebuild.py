"""Take an engine and its process group down, so that the same process can form another group and build again.

[Note: what a torn-down group leaves behind] gloo closes its connections and ends its threads when the last reference
to a group goes, and a thread that waits for a silent peer holds up that moment for the group's timeout. So a group
that has failed is severed first (`Transport.sever`), and the engine is emptied here: its module, optimizer and mesh
refer to groups, and on a GPU their memory is needed for what is built next.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed.tensor import debug

from elastic_lsopt.backends import groups
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.fabric import Fabric
from elastic_lsopt.space.geometry import ParameterSpace


class Built(Protocol):
    """What `tear_down` takes down; an `Engine` is one."""

    @property
    def backend(self) -> Backend: ...
    @property
    def space(self) -> ParameterSpace: ...


def form_group(fabric: Fabric, store: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
    """The default process group of a generation (collective); `store` is one that no other group has used.

    The launcher's variables follow: ZeRO-3 refuses a group whose size is not that of WORLD_SIZE.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    fabric.form(store, rank, world, timeout)


def tear_down(engine: Built | None) -> None:
    """End the engine (None: there is none yet) and every process group. No communication, also after a cut.

    The engine is an empty shell afterwards; its space and vectors raise StaleGeneration. Memory is freed here unless
    the caller holds the model, the optimizer or the space elsewhere. See [Note: what a torn-down group leaves behind].
    """
    zero = importlib.import_module("elastic_lsopt.backends.zero.end") if "deepspeed" in sys.modules else None
    if engine is not None:
        engine.space.retire()
        if zero is not None:
            zero.end_engine(engine.backend)
        vars(engine).clear()
    if zero is not None:
        zero.forget_groups()
    groups.forget()
    if dist.is_initialized():
        dist.destroy_process_group()
    debug._clear_sharding_prop_cache()  # placements that it remembers name the groups of the old mesh
    gc.collect()
