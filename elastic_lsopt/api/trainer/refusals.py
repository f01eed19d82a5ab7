"""What of Hugging Face's Trainer no test of ours covers, refused when the trainer is made: one line with the fix."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import Trainer

from elastic_lsopt.api.landscape_optimizer import LandscapeOptimizer
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.optimizers import registry
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.oracle.observation import refuse_unseen
from elastic_lsopt.updates.update_optimizer import updates_of

STANDS_IN_FOR = (
    "create_accelerator_and_postprocess", "create_optimizer", "get_batch_samples", "training_step", "_clip_grad_norm",
    "_get_grad_norm", "_get_num_items_in_batch", "_prepare_for_training", "_save_optimizer_and_scheduler",
    "_load_from_checkpoint", "_load_best_model", "_load_scaler",
)  # fmt: skip
"""Methods of the Trainer, some without a promise, that `trainer.py` overrides or calls."""
TESTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
"""accelerate's names of where a model lies."""
STEPS_IN_BACKWARD = ("lomo", "layerwise")
"""What is in the names of optimizers that step inside of backward."""


def method_of(landscape: Any) -> Method:
    """The method that `landscape` says: one, its name, or as in a YAML {"method": name, field: value …}; None: none.

    Raises UserError for what is none of these, an unknown name (with the nearest), and a field out of range.
    """
    if landscape is None:
        return Plain()
    if isinstance(landscape, str):
        return registry.build(landscape)
    if isinstance(landscape, dict):
        fields = dict(landscape)
        name = fields.pop("method", None) or fields.pop("import", None)
        if not isinstance(name, str):
            raise UserError(f'landscape={landscape!r} names no method; write {{"method": "sam", "rho": 0.05}}.')
        return registry.build(name, **fields)
    if isinstance(landscape, type) or not callable(getattr(landscape, "gradient", None)):
        what = landscape.__name__ if isinstance(landscape, type) else type(landscape).__name__
        raise UserError(f"landscape={what} is no method; give one, such as lso.SAM(rho=0.05), or its name.")
    return landscape


def refuse_update(base: Any, who: str) -> None:
    """Raise UserError for an update that sees more than `who` can show it, or whose model is not at the weights."""
    update = updates_of(getattr(base, "optimizer", base))
    if update is None:
        return
    refuse_unseen(update.looking(), None)
    if elsewhere := update.points():
        raise UserError(
            f"update {elsewhere[0]}: {who} evaluates and saves the weights, and the model is at an average; use "
            f"elastic-lsopt train, or a loop of your own with engine.averaged({elsewhere[0]!r})."
        )


def refuse_method(method: Method, who: str) -> None:
    """Raise UserError for a method whose model is not at the weights, which `who` evaluates and saves."""
    if hasattr(method, "point"):
        name = registry.methods.name_of(type(method))
        raise UserError(
            f"{name}: {who} evaluates and saves the weights as they are, and the model is elsewhere (without the "
            f"adversary); use elastic-lsopt train, or a loop of your own with engine.averaged({name!r})."
        )


def refuse_version() -> None:
    """Raise Unsupported for a transformers whose Trainer has not the methods that ours stands in for."""
    if missing := [name for name in STANDS_IN_FOR if not hasattr(Trainer, name)]:
        raise Unsupported(
            f"transformers {transformers.__version__}: its Trainer has no {missing[0]}; LandscapeTrainer is tested "
            'with 5.23: pip install "transformers>=5.23".'
        )


def refuse_surprises(trainer: Trainer) -> None:
    """Raise UserError or Unsupported for what the Trainer itself takes and does otherwise than it was told."""
    args = trainer.args
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and not trainer.is_fsdp_enabled:
        raise Unsupported(
            f"FSDP is asked for, and accelerate has made {trainer.accelerator.distributed_type.value} of it (on a CPU "
            "it takes DistributedDataParallel and says nothing); remove fsdp, or train on GPUs."
        )
    json = _deepspeed_json(trainer)
    if json is not None and "gradient_clipping" not in json:
        raise UserError(
            "the DeepSpeed JSON has no gradient_clipping, and accelerate then clips at 1.0 whatever max_grad_norm "
            f'({args.max_grad_norm}) says; write "gradient_clipping": "auto" into it.'
        )


def refuse_untested(trainer: Trainer, method: Method) -> None:
    """Raise UserError or Unsupported for what a method of several passes cannot serve, or no test covers."""
    args: Any = trainer.args
    if getattr(args, "n_gpu", 1) > 1:
        raise Unsupported(
            f"DataParallel on {args.n_gpu} GPUs of one process is not supported; start a process per GPU (torchrun "
            f"--nproc-per-node {args.n_gpu}), or show it one (CUDA_VISIBLE_DEVICES=0)."
        )
    refuse_method(method, "the Trainer")
    _refuse_precision(trainer)
    _refuse_places(trainer)
    _refuse_optimizer(trainer)
    several = args.world_size > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if args.auto_find_batch_size and several:
        raise Unsupported(
            "auto_find_batch_size is tested on one process without FSDP and DeepSpeed; set per_device_train_batch_size."
        )
    if args.torch_compile and several:
        raise Unsupported("torch_compile is tested on one process without FSDP and DeepSpeed; set it to False.")
    if type(trainer)._prepare_inputs is not Trainer._prepare_inputs:
        raise Unsupported(
            f"{type(trainer).__name__} makes its batches in _prepare_inputs, which each pass would run again (trl's "
            "online trainers sample there); tested are transformers.Trainer and trl.SFTTrainer."
        )
    if not any(p.requires_grad for p in _model(trainer).parameters()):
        raise UserError("the model has no trainable parameter; set requires_grad on at least one.")
    if getattr(method, "needs_logits", False):
        raise Unsupported(
            f"{type(method).__name__} needs the logits, and the Trainer's training_step gives the loss alone; use "
            "`elastic-lsopt train`, lso.Engine.of or lso.initialize."
        )
    if method.parts > args.gradient_accumulation_steps:
        raise UserError(
            f"{type(method).__name__} cuts an update into parts={method.parts}, and there are "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} micro-batches; set it to {method.parts} "
            "or more (with a smaller per_device_train_batch_size the batch stays), or take fewer parts."
        )


def _refuse_precision(trainer: Trainer) -> None:
    json = _deepspeed_json(trainer) or {}
    halves = any(p.dtype == torch.float16 for p in _model(trainer).parameters() if p.requires_grad)
    precision = str(trainer.accelerator.mixed_precision)
    if precision == "fp16" or (json.get("fp16") or {}).get("enabled") is True or halves:
        raise UserError("fp16 needs loss scaling, which is refused: one scale cannot serve two passes; use bf16=True.")
    if precision not in ("no", "bf16"):
        raise Unsupported(f"mixed precision {precision} is not tested; use bf16=True.")


def _refuse_places(trainer: Trainer) -> None:
    """Where the weights lie."""
    kind = trainer.accelerator.distributed_type.name
    if kind not in TESTED or trainer.is_fsdp_xla_enabled:
        raise Unsupported(f"accelerate's {kind} is not tested; tested are one process, DDP, FSDP2 and DeepSpeed.")
    if trainer.is_model_parallel:
        raise Unsupported("a model whose layers lie on several devices (device_map) is not tested; use FSDP.")
    sizes = trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()
    if max(sizes) > 1:
        raise Unsupported(f"tensor, context and sequence parallelism (sizes {sizes}) are not tested; leave them at 1.")
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise Unsupported('FSDP 1 is not supported; set fsdp_config={"version": 2}.')
    if plugin is not None and type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise Unsupported("FSDP2 with cpu_offload is not tested; remove it from fsdp_config.")


def _refuse_optimizer(trainer: Trainer) -> None:
    args: Any = trainer.args
    if any(word in str(getattr(args.optim, "value", args.optim)) for word in STEPS_IN_BACKWARD):
        raise UserError(
            f"optim={getattr(args.optim, 'value', args.optim)} steps inside of backward, before a method has its "
            "gradient; use another, such as adamw_torch."
        )
    if isinstance(trainer.optimizer, LandscapeOptimizer):
        raise UserError(
            "optimizers= holds a LandscapeOptimizer, whose step needs a closure that the Trainer does not give; give "
            "its base there, and the method as landscape=…"
        )


def _deepspeed_json(trainer: Trainer) -> dict[str, Any] | None:
    if not trainer.is_deepspeed_enabled:
        return None
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    return plugin.hf_ds_config.config


def _model(trainer: Trainer) -> Any:
    return trainer.model
