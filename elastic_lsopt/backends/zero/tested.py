"""What of DeepSpeed is tested here. Everything else is refused before a step is taken, never run on trust.

The lists name what is let through, so that an option which a later DeepSpeed adds is refused until a test covers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from elastic_lsopt.errors import Unsupported

SUPPORTED = (
    "ZeRO stages 0 to 3 in fp32 and bf16 on data-parallel ranks, the optimizer (stages 1 to 3) and the parameters "
    "(stage 3) on the device or on the host, without NVMe, MoE, tensor, pipeline or sequence parallelism, "
    "quantisation, hpZ, DeepCompile, ZenFlow and SuperOffload"
)

# Any value of these is tested, or changes no number: batch arithmetic that we write ourselves, sizes, reports.
FREE = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "optimizer",
    "zero_allow_untested_optimizer", "steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown",
    "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "activation_checkpointing",
}  # fmt: skip
FREE_IN_ZERO = {
    "stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size",
    "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
    "gather_16bit_weights_on_model_save", "load_from_fp32_weights", "log_trace_cache_warnings",
}  # fmt: skip
# Blocks that move something to the host, with the stages at which they are tested. The host's memory is free to be
# pinned or not; all else in them is for NVMe, or leaves part of the optimizer on the device.
OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
# Tested with these values only.
LIMITED = {
    "gradient_accumulation_steps": (1,),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1, 1.0),
    "managed_gradient_accumulation": (True,),
}
FP16 = "fp16: loss scaling is refused, one scale cannot serve two passes: use bf16."


def refuse_untested(config: Mapping[str, Any]) -> None:
    """Raise Unsupported for the first key of a DeepSpeed JSON that no test covers with that value; touches nothing."""
    _refuse_sums(config)
    for key, value in config.items():
        if key == "zero_optimization":
            _refuse_in_zero(value)
        elif key == "bf16":
            _refuse_in_bf16(value)
        elif key == "fp16" and not _off(value):
            raise Unsupported(FP16)
        elif key in LIMITED:
            if value not in LIMITED[key]:
                raise _untested(f"{key}={value!r}", f"tested: {' or '.join(map(repr, LIMITED[key]))}")
        elif key not in (*FREE, "data_types") and not _off(value):
            raise _untested(key)


def _refuse_in_zero(block: Mapping[str, Any]) -> None:
    names = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    names.update((name, name) for name in DeepSpeedZeroConfig.model_fields)
    for key, value in block.items():
        name = names.get(key)
        if name is None:
            raise Unsupported(f"DeepSpeed has no option zero_optimization.{key}; remove it.")
        if name in FREE_IN_ZERO or _off_device(value):
            continue
        if name in OFFLOAD:
            _refuse_in_offload(name, value, block.get("stage", 0))
            continue
        default = DeepSpeedZeroConfig.model_fields[name].get_default(call_default_factory=True)
        if value != default:
            raise _untested(f"zero_optimization.{key}={value!r}", f"remove it, or leave it at {default!r}")


def _refuse_in_offload(name: str, block: Any, stage: int) -> None:
    tested = {"device": ("cpu",), "pin_memory": (True, False), "ratio": (1, 1.0)}
    for key, value in block.items() if isinstance(block, Mapping) else [("device", block)]:
        if key in tested and value in tested[key]:
            continue
        if key == "device":
            raise _untested(f"zero_optimization.{name}.device={value!r}", "use {device: cpu}, or remove it")
        if not _off(value):
            raise _untested(f"zero_optimization.{name}.{key}={value!r}")
    if stage not in OFFLOAD[name]:
        raise _untested(f"zero_optimization.{name} at stage {stage}", f"it is for stage {OFFLOAD[name]}")


def _refuse_in_bf16(block: Mapping[str, Any]) -> None:
    for key, value in block.items():
        if key not in ("enabled", "immediate_grad_update", "check_grad_overflow") and not _off(value):
            raise _untested(f"bf16.{key}={value!r}")


def _refuse_sums(config: Mapping[str, Any]) -> None:
    """Gradients are summed in the weights' precision, or in fp32 beside bf16 weights under ZeRO."""
    bf16 = (config.get("bf16") or {}).get("enabled", False)
    fine: tuple[Any, ...] = (None, "bf16") if bf16 else (None, "fp32")
    if bf16 and (config.get("zero_optimization") or {}).get("stage", 0):
        fine += ("fp32",)
    for key, value in (config.get("data_types") or {}).items():
        if value is not None and (key != "grad_accum_dtype" or value not in fine):
            raise _untested(f"data_types.{key}={value!r}", "remove it, or use fp32 with bf16 weights and ZeRO")


def refuse_engine(engine: Any) -> None:
    """Raise Unsupported for what an engine is and no JSON says: pipelines, other parallel groups, experts."""
    if engine.pipeline_parallelism:
        raise _untested("pipeline parallelism")
    if engine.mpu is not None or engine.autotp_size() > 1:
        raise _untested("tensor parallelism (an mpu)")
    if engine.has_moe_layers:
        raise _untested("mixture of experts")
    if engine.dp_world_size != engine.world_size or engine.sequence_parallel_size > 1:
        raise _untested(f"a data-parallel world of {engine.dp_world_size} among {engine.world_size} ranks")
    if engine.is_deepcompile_enabled():
        raise _untested("DeepCompile")
    if engine.gradient_accumulation_steps() != 1:
        raise _untested(
            f"gradient_accumulation_steps={engine.gradient_accumulation_steps()}",
            "set it to 1: train_batch() takes any number of micro-batches",
        )
    if engine.fp16_enabled():
        raise Unsupported(FP16)


def _off(value: Any) -> bool:
    return value in (None, False, {}) or (isinstance(value, Mapping) and value.get("enabled", None) is False)


def _off_device(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("device", "") in (None, "none"))


def _untested(what: str, fix: str = "remove it") -> Unsupported:
    return Unsupported(f"DeepSpeed with {what} is not tested; {fix}. Supported: {SUPPORTED}.")
