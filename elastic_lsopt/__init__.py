"""Landscape-aware optimizers on sharded parameters: a DeepSpeed/FSDP integration layer with an elastic runtime."""

from typing import TYPE_CHECKING, Any

from elastic_lsopt.errors import (
    NonFinite,
    PeerFailed,
    StaleGeneration,
    StaleLease,
    StaleWeights,
    Unsupported,
    UserError,
)
from elastic_lsopt.faces.attach import attach
from elastic_lsopt.faces.engine import Engine
from elastic_lsopt.faces.initialize import initialize
from elastic_lsopt.faces.landscape_optimizer import LandscapeOptimizer
from elastic_lsopt.faces.report import StepReport
from elastic_lsopt.optimizers import registry
from elastic_lsopt.optimizers.asam import ASAM
from elastic_lsopt.optimizers.lpf_sgd import LPFSGD
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.optimizers.sam import SAM
from elastic_lsopt.oracle.loss import Loss
from elastic_lsopt.oracle.units import Unit

if TYPE_CHECKING:
    from elastic_lsopt import elastic, probes
    from elastic_lsopt.faces.trainer_callback import ProbeCallback

__version__ = "0.1.0"
__all__ = [
    "ASAM",
    "LPFSGD",
    "SAM",
    "Engine",
    "LandscapeOptimizer",
    "Loss",
    "NonFinite",
    "PeerFailed",
    "Plain",
    "ProbeCallback",
    "StaleGeneration",
    "StaleLease",
    "StaleWeights",
    "StepReport",
    "Unit",
    "Unsupported",
    "UserError",
    "attach",
    "elastic",
    "initialize",
    "probes",
    "registry",
]


def __getattr__(name: str) -> Any:
    """What is imported where it is used, because other jobs need not wait for it."""
    from importlib import import_module

    if name in ("elastic", "probes"):
        return import_module(f"elastic_lsopt.{name}")
    if name == "ProbeCallback":  # needs transformers
        return import_module("elastic_lsopt.faces.trainer_callback").ProbeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
