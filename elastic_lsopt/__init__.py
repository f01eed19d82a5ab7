"""Landscape-aware optimizers on sharded parameters: a DeepSpeed/FSDP integration layer with an elastic runtime.

Each public name is imported where it is first used. A command's help, the reader of a YAML file and a report need no
torch, whose import alone costs more than they do; and torch loads our rendezvous handler from this package while it
imports itself, when nothing here could import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lsopt import elastic, probes
    from elastic_lsopt.api.attach import attach
    from elastic_lsopt.api.engine import Engine
    from elastic_lsopt.api.initialize import initialize
    from elastic_lsopt.api.landscape_optimizer import LandscapeOptimizer
    from elastic_lsopt.api.trainer_callback import ProbeCallback
    from elastic_lsopt.errors import (
        NonFinite,
        PeerFailed,
        StaleGeneration,
        StaleGradient,
        StaleWeights,
        Unsupported,
        UserError,
    )
    from elastic_lsopt.optimizers import registry
    from elastic_lsopt.optimizers.asam import ASAM
    from elastic_lsopt.optimizers.lpf_sgd import LPFSGD
    from elastic_lsopt.optimizers.plain import Plain
    from elastic_lsopt.optimizers.sam import SAM
    from elastic_lsopt.oracle.loss import Loss
    from elastic_lsopt.oracle.microbatch import MicroBatch
    from elastic_lsopt.oracle.report import StepReport

__version__ = "0.1.0"
__all__ = [
    "ASAM",
    "LPFSGD",
    "SAM",
    "Engine",
    "LandscapeOptimizer",
    "Loss",
    "MicroBatch",
    "NonFinite",
    "PeerFailed",
    "Plain",
    "ProbeCallback",
    "StaleGeneration",
    "StaleGradient",
    "StaleWeights",
    "StepReport",
    "Unsupported",
    "UserError",
    "attach",
    "elastic",
    "initialize",
    "probes",
    "registry",
]

_HOMES = {
    "ASAM": "optimizers.asam",
    "LPFSGD": "optimizers.lpf_sgd",
    "SAM": "optimizers.sam",
    "Engine": "api.engine",
    "LandscapeOptimizer": "api.landscape_optimizer",
    "Loss": "oracle.loss",
    "MicroBatch": "oracle.microbatch",
    "NonFinite": "errors",
    "PeerFailed": "errors",
    "Plain": "optimizers.plain",
    "ProbeCallback": "api.trainer_callback",
    "StaleGeneration": "errors",
    "StaleGradient": "errors",
    "StaleWeights": "errors",
    "StepReport": "oracle.report",
    "Unsupported": "errors",
    "UserError": "errors",
    "attach": "api.attach",
    "initialize": "api.initialize",
}
_MODULES = {"elastic": "elastic", "probes": "probes", "registry": "optimizers.registry"}


def __getattr__(name: str) -> Any:
    """The public name, imported now and kept, so that the next look-up costs nothing."""
    if name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        found = import_module(f"{__name__}.{_MODULES[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
