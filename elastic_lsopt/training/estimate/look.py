"""A job's model as the estimates see it: built on the meta device, and run once on tensors without storage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_lsopt.api.base_view import refuse_lacking
from elastic_lsopt.config.import_paths import import_paths
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.training.building.base_optimizer import base_of
from elastic_lsopt.training.building.engines import loss_of
from elastic_lsopt.training.building.models import apply_activation_checkpointing, blocks, build_model
from elastic_lsopt.training.building.rules import refuse_unmet_rule
from elastic_lsopt.training.estimate.activations import Pass, Shapes, run_without_storage
from elastic_lsopt.training.estimate.merged_noise import add_noise
from elastic_lsopt.training.estimate.repeated import AGAIN, few_of, with_more_blocks
from elastic_lsopt.training.estimate.size import ModelSize

FEATURES = 64
"""Of a digit, the only data of a plain torch classifier."""


@dataclass(frozen=True)
class Looked:
    """`moments` is the pass of a micro-batch, None where it cannot be run without numbers; then `why`."""

    size: ModelSize
    moments: Pass | None = None
    why: str = ""


def look_at_model(config: TrainConfig, method: Method | None = None, *, passes: bool = True) -> Looked:
    """Build the job's model without weights and, for `passes`, count a micro-batch's pass.

    Neither a GPU nor data nor a process group is needed. Raises SettingError for a model that cannot be built, for a
    rule of `param_groups` that no parameter takes, and for a base that lacks what the method or the rule of consensus
    needs.
    """
    model = build_model(config, vocabulary_size=_rows(config), device="meta")
    if not any(key.startswith(("optim", "param_groups")) for key, _ in import_paths(config)):
        base = base_of(config, model)(model.parameters())
        _refuse_base(method, base)
        if method is not None and "consensus" not in {key.partition(".")[0] for key, _ in import_paths(config)}:
            refuse_unmet_rule(config, method, base)
    repeated = blocks(model)
    size = ModelSize.of(model, repeated)
    if not passes:
        return Looked(size)
    if config.activation_checkpointing:
        apply_activation_checkpointing(model)
    casts = config.bf16 and config.backend != "replicated"  # which rounds its weights in the forward, by autocast
    dtype = torch.bfloat16 if casts else None
    if config.landscape_space == "merged":
        add_noise(model)
    try:
        with few_of(model, repeated) as few:
            moments = run_without_storage(model, loss_of(config, model), microbatch_of(config), few, dtype=dtype)
    except Exception as error:  # whatever a model's forward asks of numbers that are not there
        return Looked(size, None, " ".join(str(error).split())[:200] or type(error).__name__)
    more = len(repeated) - len(few)
    gradient = (dtype or torch.float32).itemsize * size.blocks[AGAIN].trained if more else 0
    return Looked(size, with_more_blocks(moments, more, gradient))


def _refuse_base(method: Method | None, base: torch.optim.Optimizer) -> None:
    try:
        if method is not None:
            refuse_lacking(method, base)
    except UserError as error:
        raise SettingError("optim", str(error)) from None


def microbatch_of(config: TrainConfig) -> Shapes:
    """Shapes and types of a micro-batch, the longest that there can be."""
    samples, length = config.per_device_train_batch_size, config.block_size
    match config.task:
        case "causal_lm":
            return {name: ((samples, length), torch.int64) for name in ("input_ids", "labels")}
        case "sequence_classification":
            inputs = {name: ((samples, length), torch.int64) for name in ("input_ids", "attention_mask")}
            return inputs | {"labels": ((samples,), torch.int64)}
        case _:
            return {"x": ((samples, FEATURES), torch.float32), "labels": ((samples,), torch.int64)}


def _rows(config: TrainConfig) -> int | None:
    """The vocabulary of a model folder that comes without a tokenizer: its own; None: what the job's tokenizer has."""
    if config.model_name_or_path is None or config.tokenizer_name_or_path is not None:
        return None
    try:
        said = json.loads((Path(config.model_name_or_path).expanduser() / "config.json").read_text(encoding="utf-8"))
        rows = said.get("vocab_size", said.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None  # a name of the cache, or a folder that `build_model` refuses with its own words
    return rows if isinstance(rows, int) else None
