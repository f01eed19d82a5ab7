"""What a DeepSpeed JSON may say here, and what DeepSpeed is told instead.

DeepSpeed's batch arithmetic is bypassed: micro-batches, weights and step boundaries are ours, so it gets a
micro-batch of 1, an accumulation of 1 and a train batch of `world` (it asserts the product). Only what needs
no import of DeepSpeed is checked here; the ZeRO backends refuse the rest when they see the engine.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from elastic_lsopt.config.settings import SettingError, TrainConfig

Json = dict[str, Any]

# Blocks that are refused wherever they stand in a file, and what to do instead.
REFUSED_BLOCKS = {
    "elasticity": "DeepSpeed's elastic training was removed from it; remove the block",
    "amp": "loss scaling is refused; use bf16",
    "scheduler": "learning rates follow committed samples; remove the block, use lr_scheduler_type",
}


def read_deepspeed_json(source: str | Path | Json) -> Json:
    """A DeepSpeed config from its file, or a copy of a mapping.

    Raises SettingError for a missing file, broken JSON, a key that stands twice, and for what cannot be right
    here: elasticity, fp16 and amp (loss scaling), scheduler, offload to NVMe, a ZeRO stage other than 0 to 3.
    """
    if isinstance(source, dict):
        config, name = deepcopy(source), "deepspeed"
    else:
        config, name = _parse(Path(source)), str(source)
    for block, why in REFUSED_BLOCKS.items():
        if block in config:
            raise _refusal(block, why, name)
    for key in ("fp16", "bf16", "optimizer", "zero_optimization"):
        if not isinstance(config.get(key, {}), dict):
            raise SettingError("deepspeed", f"{name}: {key} must be a block of keys, but it is {config[key]!r}.")
    if config.get("fp16", {}).get("enabled") is True:
        raise _refusal("fp16", "loss scaling is not supported; use bf16", name)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise SettingError("deepspeed", f"{name}: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3.")
    for key in ("cpu_offload", "cpu_offload_params"):
        if zero.get(key):
            raise _refusal(f"zero_optimization.{key}", "write offload_optimizer: {device: cpu}", name)
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        block = zero.get(key)
        device = block.get("device", "none") if isinstance(block, dict) else block
        if device in (None, False, "none"):
            continue
        if device != "cpu":
            raise _refusal(f"zero_optimization.{key}", f"offload to {device!r} is not tested; use device: cpu", name)
        if stage not in stages:
            wanted = "1, 2 or 3" if len(stages) > 1 else "3"
            raise _refusal(f"zero_optimization.{key}", f"it is for stage {wanted}, but stage={stage}", name)
    return config


def zero_stage(ds_config: Json) -> int:
    """The ZeRO stage, 0 to 3."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def split_method(ds_config: Json, method_names: Iterable[str]) -> tuple[Json, str | None, Json]:
    """Take a landscape method out of the `optimizer` block, before DeepSpeed sees it.

        "optimizer": {"type": "sam", "params": {"rho": 0.05, "base": {"type": "AdamW", "params": {"lr": 1e-5}}}}

    gives the config without the block, "sam" and the params, `base` among them. Another type of optimizer
    is DeepSpeed's own: the config comes back as it is, with None and {}.
    """
    block = ds_config.get("optimizer") or {}
    name = str(block.get("type", "")).lower()
    if name not in method_names:
        return ds_config, None, {}
    return {k: v for k, v in ds_config.items() if k != "optimizer"}, name, dict(block.get("params") or {})


def check_job(ds_config: Json, config: TrainConfig) -> None:
    """Refuse, with a SettingError, a JSON that contradicts the job's YAML; `auto` and absence agree with all."""
    if "optimizer" in ds_config:
        raise _refusal("optimizer", "a job's optimizer is `optim` and `landscape` in the YAML; remove the block")
    if ds_config.get("gradient_accumulation_steps", "auto") != "auto":
        raise _refusal("gradient_accumulation_steps", "accumulation follows from the batch and the world size")
    agree = {
        "train_batch_size": ("global_batch_size", config.global_batch_size),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", config.per_device_train_batch_size),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "bf16.enabled": ("bf16", config.bf16),
    }
    for key, (ours, value) in agree.items():
        given = _get(ds_config, key)
        if given not in (None, "auto", value):
            raise _refusal(f"{key}={given!r}", f'the YAML says {ours}={value!r}; write "auto" or remove it')


def engine_json(ds_config: Json, *, world: int, max_grad_norm: float, bf16: bool) -> Json:
    """What `deepspeed.initialize` gets: the user's config with the batch keys bypassed and nothing left to a default.

    `max_grad_norm` is the limit of the global L2 norm, 0 for none: always written, because DeepSpeed's own
    default is 1.0 since 0.19.8. Keys that read `auto` are left out, so DeepSpeed's defaults hold for them.
    """
    given = _without_auto(ds_config)
    given.pop("fp16", None)
    return {
        **given,
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(max_grad_norm),
        "bf16": {**given.get("bf16", {}), "enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,  # else it refuses torch's optimizers on the host
        "zero_allow_untested_optimizer": True,  # else DeepSpeed refuses every optimizer that is not on its list
        "steps_per_print": 2**31 - 1,  # the trainer reports; DeepSpeed's own lines would break its progress bar
    }


def _refusal(what: str, why: str, name: str = "the DeepSpeed JSON") -> SettingError:
    return SettingError("deepspeed", f"{name}: {what} is refused: {why}.")


def _parse(path: Path) -> Json:
    def once(pairs: list[tuple[str, Any]]) -> Json:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise SettingError("deepspeed", f"{path}: key {key!r} stands twice; keep one.")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise SettingError("deepspeed", f"the DeepSpeed JSON {path} does not exist.") from None
    except json.JSONDecodeError as error:
        raise SettingError("deepspeed", f"{path}:{error.lineno}: broken JSON: {error.msg}.") from None
    except RecursionError:
        raise SettingError("deepspeed", f"{path}: broken JSON: nested too deeply.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SettingError("deepspeed", f"the DeepSpeed JSON {path} cannot be read: {reason}.") from None
    if not isinstance(config, dict):
        raise SettingError("deepspeed", f"{path} must hold a JSON object.")
    return config


def _get(config: Json, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
