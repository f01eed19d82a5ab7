"""Landscape-aware optimizers on sharded parameters: a DeepSpeed/FSDP integration layer with an elastic runtime.

Each public name is imported where it is first used. A command's help, the reader of a YAML file and a report need no
torch, whose import alone costs more than they do; and torch loads our rendezvous handler from this package while it
imports itself, when nothing here could import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lsopt import averages, consensus, elastic, probes, updates
    from elastic_lsopt.api.attach import attach
    from elastic_lsopt.api.engine import Engine
    from elastic_lsopt.api.initialize import initialize
    from elastic_lsopt.api.landscape_optimizer import LandscapeOptimizer
    from elastic_lsopt.api.lightning_strategy import LandscapeDeepSpeedStrategy
    from elastic_lsopt.api.replicas.join_replicas import join_replicas
    from elastic_lsopt.api.trainer.probe_callback import ProbeCallback
    from elastic_lsopt.api.trainer.trainer import LandscapeTrainer, LandscapeTrainerMixin
    from elastic_lsopt.averages.average import Average
    from elastic_lsopt.averages.ema import EMA
    from elastic_lsopt.averages.lawa import LAWA
    from elastic_lsopt.averages.swa import SWA
    from elastic_lsopt.checkpoint.save import load, save
    from elastic_lsopt.data.loader import StepLoader
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
    from elastic_lsopt.optimizers.ae_sam import AESAM
    from elastic_lsopt.optimizers.asam import ASAM
    from elastic_lsopt.optimizers.bi_lora import BiLoRA
    from elastic_lsopt.optimizers.entropy_sgd import EntropySGD
    from elastic_lsopt.optimizers.esam import ESAM
    from elastic_lsopt.optimizers.flat_lora import FlatLoRA
    from elastic_lsopt.optimizers.friendly_sam import FriendlySAM
    from elastic_lsopt.optimizers.functional_sam import FunctionalSAM
    from elastic_lsopt.optimizers.gsam import GSAM
    from elastic_lsopt.optimizers.looksam import LookSAM
    from elastic_lsopt.optimizers.lpf_sgd import LPFSGD
    from elastic_lsopt.optimizers.m_sam import MicroSAM
    from elastic_lsopt.optimizers.momentum_sam import MomentumSAM
    from elastic_lsopt.optimizers.nbar import NBAR
    from elastic_lsopt.optimizers.plain import Plain
    from elastic_lsopt.optimizers.random_sam import RandomSAM
    from elastic_lsopt.optimizers.rwp import RWP
    from elastic_lsopt.optimizers.sam import SAM
    from elastic_lsopt.optimizers.sampa import SAMPa
    from elastic_lsopt.optimizers.wsam import WSAM
    from elastic_lsopt.oracle.losses.loss import Loss
    from elastic_lsopt.oracle.microbatch import MicroBatch
    from elastic_lsopt.oracle.step_report import StepReport
    from elastic_lsopt.space.vector import Scales
    from elastic_lsopt.updates.adahessian import AdaHessian
    from elastic_lsopt.updates.adaptive_memory import AdaptiveMemory
    from elastic_lsopt.updates.lamb import LAMB
    from elastic_lsopt.updates.lars import LARS
    from elastic_lsopt.updates.muon import Muon
    from elastic_lsopt.updates.sassha import SASSHA
    from elastic_lsopt.updates.schedule_free import ScheduleFree
    from elastic_lsopt.updates.soap import SOAP
    from elastic_lsopt.updates.sophia import SophiaG, SophiaH
    from elastic_lsopt.updates.update import Update
    from elastic_lsopt.updates.update_optimizer import UpdateOptimizer

__version__ = "0.1.0"
__all__ = [
    "AESAM",
    "ASAM",
    "EMA",
    "ESAM",
    "GSAM",
    "LAMB",
    "LARS",
    "LAWA",
    "LPFSGD",
    "NBAR",
    "RWP",
    "SAM",
    "SASSHA",
    "SOAP",
    "SWA",
    "WSAM",
    "AdaHessian",
    "AdaptiveMemory",
    "Average",
    "BiLoRA",
    "Engine",
    "EntropySGD",
    "FlatLoRA",
    "FriendlySAM",
    "FunctionalSAM",
    "LandscapeDeepSpeedStrategy",
    "LandscapeOptimizer",
    "LandscapeTrainer",
    "LandscapeTrainerMixin",
    "LookSAM",
    "Loss",
    "MicroBatch",
    "MicroSAM",
    "MomentumSAM",
    "Muon",
    "NonFinite",
    "PeerFailed",
    "Plain",
    "ProbeCallback",
    "RandomSAM",
    "SAMPa",
    "Scales",
    "ScheduleFree",
    "SophiaG",
    "SophiaH",
    "StaleGeneration",
    "StaleGradient",
    "StaleWeights",
    "StepLoader",
    "StepReport",
    "Unsupported",
    "Update",
    "UpdateOptimizer",
    "UserError",
    "attach",
    "averages",
    "consensus",
    "elastic",
    "initialize",
    "join_replicas",
    "load",
    "probes",
    "registry",
    "save",
    "updates",
]

_HOMES = {
    "NBAR": "optimizers.nbar",
    "BiLoRA": "optimizers.bi_lora",
    "AESAM": "optimizers.ae_sam",
    "EntropySGD": "optimizers.entropy_sgd",
    "ESAM": "optimizers.esam",
    "FriendlySAM": "optimizers.friendly_sam",
    "FunctionalSAM": "optimizers.functional_sam",
    "GSAM": "optimizers.gsam",
    "LookSAM": "optimizers.looksam",
    "MomentumSAM": "optimizers.momentum_sam",
    "MicroSAM": "optimizers.m_sam",
    "RandomSAM": "optimizers.random_sam",
    "RWP": "optimizers.rwp",
    "SAMPa": "optimizers.sampa",
    "WSAM": "optimizers.wsam",
    "ASAM": "optimizers.asam",
    "Average": "averages.average",
    "EMA": "averages.ema",
    "Engine": "api.engine",
    "AdaptiveMemory": "updates.adaptive_memory",
    "ScheduleFree": "updates.schedule_free",
    "AdaHessian": "updates.adahessian",
    "SASSHA": "updates.sassha",
    "SOAP": "updates.soap",
    "SophiaG": "updates.sophia",
    "SophiaH": "updates.sophia",
    "LAMB": "updates.lamb",
    "LARS": "updates.lars",
    "LAWA": "averages.lawa",
    "FlatLoRA": "optimizers.flat_lora",
    "LPFSGD": "optimizers.lpf_sgd",
    "LandscapeDeepSpeedStrategy": "api.lightning_strategy",
    "LandscapeOptimizer": "api.landscape_optimizer",
    "LandscapeTrainer": "api.trainer.trainer",
    "LandscapeTrainerMixin": "api.trainer.trainer",
    "Loss": "oracle.losses.loss",
    "MicroBatch": "oracle.microbatch",
    "Muon": "updates.muon",
    "NonFinite": "errors",
    "PeerFailed": "errors",
    "Plain": "optimizers.plain",
    "ProbeCallback": "api.trainer.probe_callback",
    "SAM": "optimizers.sam",
    "SWA": "averages.swa",
    "Scales": "space.vector",
    "StaleGeneration": "errors",
    "StaleGradient": "errors",
    "StaleWeights": "errors",
    "StepLoader": "data.loader",
    "StepReport": "oracle.step_report",
    "Unsupported": "errors",
    "Update": "updates.update",
    "UpdateOptimizer": "updates.update_optimizer",
    "UserError": "errors",
    "attach": "api.attach",
    "initialize": "api.initialize",
    "join_replicas": "api.replicas.join_replicas",
    "load": "checkpoint.save",
    "save": "checkpoint.save",
}
_MODULES = {
    "averages": "averages",
    "consensus": "consensus",
    "elastic": "elastic",
    "probes": "probes",
    "registry": "optimizers.registry",
    "updates": "updates",
}


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
