"""End DeepSpeed: all that it keeps for the life of a process, forgotten, so that the same process can start it anew.

Private to DeepSpeed, as `zero.PRIVATE` is: its handle on the process group; ZeRO-3's running numbers of modules and
parameters, which ranks compare with each other (a newcomer counts from 0); the stack of modules in whose forward it is,
which a broken pass leaves full; and torch's own linear, in whose place ZeRO-3 puts another for good.

[Note: ranks with different pasts] With that other linear, weight and bias have their gradients in another order, and
ZeRO-2 adds gradients up in the order in which they are ready. A rank that had once been in a ZeRO-3 job and one that
had not would add up elements that do not belong together, and nobody would notice.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import Init, InsertPostInitMethodToModuleSubClasses

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.zero.zero_backend import ZeroBackend


def end_engine(backend: Backend) -> None:
    """Take DeepSpeed's hooks out of its engine, and its shards out of the parameters. No communication.

    ZeRO-3's parameters refer to their engine through nodes of autograd, which Python's collector cannot see: left as
    they are, masters, shards and gathered weights would stay in memory for good.
    """
    if isinstance(backend, ZeroBackend):
        backend.engine.destroy()
        if backend.name == "zero3":
            for parameter in backend.engine.module.parameters():
                vars(parameter).clear()
                parameter.untyped_storage().resize_(0)
        vars(backend.engine).clear()


def forget_groups() -> None:
    """Before torch's groups are destroyed: drop DeepSpeed's references to them, start its counters at 0, and give torch
    its own linear back. See [Note: ranks with different pasts]."""
    if comm.cdb is not None and comm.cdb.is_initialized():
        comm.destroy_process_group()
    comm.cdb = None
    Init.param_id = 0
    numbering: Any = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module
    numbering.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    if torch.nn.functional.linear is zero3_linear_wrap:
        patched: Any = InsertPostInitMethodToModuleSubClasses
        torch.nn.functional.linear = patched.linear_bk
