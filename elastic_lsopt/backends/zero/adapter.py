"""The adapter for a DeepSpeed engine, by the class of the wrapper around its base optimizer."""

from __future__ import annotations

from typing import Any

import torch

from elastic_lsopt.backends.zero.tested import SUPPORTED, refuse_engine, refuse_untested
from elastic_lsopt.backends.zero.zero0 import Zero0
from elastic_lsopt.backends.zero.zero3 import Zero3
from elastic_lsopt.backends.zero.zero12 import Bf16Zero1, Zero12
from elastic_lsopt.backends.zero.zero_backend import ZeroBackend, check_private, check_version
from elastic_lsopt.backends.zero.zero_offload import OffloadedZero3, OffloadedZero12
from elastic_lsopt.errors import Unsupported


def zero_backend(engine: Any) -> ZeroBackend:
    """The adapter for a DeepSpeed engine (collective: a gather of port numbers).

    Raises Unsupported for another version of DeepSpeed, a wrapper class without adapter, and all that is not tested.
    """
    check_version()
    if type(engine).__name__ != "DeepSpeedEngine":
        raise Unsupported(f"a {type(engine).__name__} of DeepSpeed is not tested. Supported: {SUPPORTED}.")
    refuse_engine(engine)
    refuse_untested(engine._config._param_dict)
    kind = type(engine.optimizer).__name__
    adapters: dict[str, type[ZeroBackend]] = {
        "FP16_UnfusedOptimizer": Zero0,
        "DeepSpeedZeroOptimizer": Zero12,
        "BF16_Optimizer": Bf16Zero1,
        "DeepSpeedZeroOptimizer_Stage3": Zero3,
    }
    offloaded: dict[str, type[ZeroBackend]] = {
        "DeepSpeedZeroOptimizer": OffloadedZero12,
        "DeepSpeedZeroOptimizer_Stage3": OffloadedZero3,
    }
    check_private(engine, "DeepSpeedEngine")
    if kind in adapters:
        check_private(engine.optimizer, kind)
        if on_host := engine.zero_use_cpu_optimizer():
            check_private(engine.optimizer, f"offloaded {kind}")
        if kind.endswith("Stage3"):
            for p in engine.module.parameters():
                check_private(p, "Parameter")
        return (offloaded if on_host else adapters)[kind](engine)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return Zero0(engine)
    raise Unsupported(f"DeepSpeed's {kind} has no adapter. Supported: {SUPPORTED} ({', '.join(adapters)}).")
