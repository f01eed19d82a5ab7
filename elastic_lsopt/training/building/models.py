"""The model of a job: a Hugging Face folder or name, a config from scratch, or a torch model by import path.

    model_name_or_path: runs/a/export                                       # weights as saved
    model: {model_type: llama, hidden_size: 192, num_hidden_layers: 4}      # from scratch, from config.seed
    model: {import: "package.module:callable", args: {inputs: 64}}          # whatever the callable returns

Weights are fp32 (the masters; a backend casts for bf16). A transformers model is made without memory for its
parameters, and each rank fills what it holds, from the files or from the seed (checkpoint/huggingface): the same values
at any world size and on any backend. A torch model by import path is built whole on every rank.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elastic_lsopt.checkpoint.huggingface.drawn_weights import DrawnWeights
from elastic_lsopt.checkpoint.huggingface.folder_identity import identity_of_folder
from elastic_lsopt.checkpoint.huggingface.folder_weights import FolderWeights
from elastic_lsopt.checkpoint.huggingface.lora import AdaptedWeights
from elastic_lsopt.checkpoint.huggingface.weights import Weights, WholeWeights, give_buffers, give_memory
from elastic_lsopt.config.settings import SettingError, TrainConfig, landscape_fields
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.elastic.worker.same_data import BASE, Identity
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.optimizers import registry
from elastic_lsopt.oracle.replay.slot import replayed
from elastic_lsopt.training.building.adapters import add_adapters
from elastic_lsopt.training.building.hub import local_only
from elastic_lsopt.training.building.imported_model import imported
from elastic_lsopt.training.building.packed_models import refuse_mixed_documents
from elastic_lsopt.training.datasets.tokens import ByteTokens, tokens_of

log = logging.getLogger("elastic_lsopt")
_SAFE = {"trust_remote_code": False}
"""No remote code (and no pickled weights): both would run what the folder's author wrote."""


def build_model(
    config: TrainConfig,
    *,
    vocabulary_size: int | None = None,
    classes: int | Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The whole model in training mode, its random weights drawn from `config.seed` alone; torch's generators stay.

    `vocabulary_size` and `classes` (of sequence_classification: their number, or their names, which go into the config)
    come from the data; None: the tokenizer's size, and the number in `model`, the folder or Hugging Face's default, 2.
    `device="meta"` gives shapes without memory (and without the weights of a folder); on any other device the weights
    are drawn on the CPU first, so they do not depend on it.

    Raises SettingError, one line, for a model that is missing, a key or import path that is wrong, a vocabulary or a
    context that is too small, and for a folder whose files are not whole or not of the model (see FolderWeights).
    """
    target = torch.device(device or "cpu")
    if target.type == "meta":
        model = _meta(config, vocabulary_size, classes)
        _adapt(model, config)
        return model
    model, weights = shape_and_weights(config, vocabulary_size=vocabulary_size, classes=classes)
    if weights is not None:
        give_memory(model, torch.device("cpu"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                weights.copy_to(p.view(-1), name, 0)
    return model.to(target)


def shape_and_weights(
    config: TrainConfig, *, vocabulary_size: int | None = None, classes: int | Sequence[str] | None = None
) -> tuple[nn.Module, Weights | None]:
    """The model without memory for its parameters, and what they are to be filled from; its buffers have their values.

    None stands beside a torch model by import path, which has its values already. Each rank fills what it will hold.
    """
    cpu = torch.device("cpu")
    if config.model is not None and "import" in config.model:
        with replayed(config.seed, cpu):
            model = imported(config.model["import"], config.model.get("args", {}))
            _adapt(model, config)
        return model.train(), None
    model = _meta(config, vocabulary_size, classes)
    where = config.model_name_or_path
    try:
        weights: Weights
        if where is None:
            weights = DrawnWeights(model, config.seed)
        else:
            with _one_line("model_name_or_path", f"model_name_or_path={where!r}"):
                weights = FolderWeights(_cached_folder(where), model, missing=lambda: DrawnWeights(model, config.seed))
        give_buffers(model, weights)
    except Unsupported as reason:
        log.warning("%s: each rank builds the whole %s in its host memory.", reason, type(model).__name__)
        with replayed(config.seed, cpu):
            weights = WholeWeights(_transformer(config, vocabulary_size, classes, whole=True))
        give_buffers(model, weights)
    if config.lora is not None:
        _adapt(model, config)
        weights = AdaptedWeights(model, weights, config.seed)
    return model, weights


def _meta(config: TrainConfig, vocabulary_size: int | None, classes: int | Sequence[str] | None) -> nn.Module:
    """The model's shapes, in training mode and without adapters."""
    with replayed(config.seed, torch.device("cpu")), torch.device("meta"):
        if config.model is not None and "import" in config.model:
            return imported(config.model["import"], config.model.get("args", {})).train()
        return _transformer(config, vocabulary_size, classes).train()


def _adapt(model: nn.Module, config: TrainConfig) -> None:
    if config.lora is not None:
        add_adapters(
            model, config.lora, task=config.task, seed=config.seed, base=config.model_name_or_path,
            adversary=_rank_of_adversary(config),
        )  # fmt: skip


def _rank_of_adversary(config: TrainConfig) -> int | None:
    """Of the second adapter that the method trains against the first; None where it has none."""
    method, fields = landscape_fields(config)
    return registry.build(method, **fields).r if method == "bi_lora" else None


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in order: the children of each outermost ModuleList whose modules are of one class; or [].

    These are the units of per-block sharding and activation checkpointing; lists inside a block (experts) belong to it.
    """
    if isinstance(model, nn.ModuleList) and len({type(child) for child in model}) == 1:
        return list(model)
    return [block for child in model.children() for block in blocks(child)]


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass, with its dropout: memory for a third more arithmetic.

    Raises UserError for a model without repeated blocks.
    """
    repeated = blocks(model)
    if not repeated:
        raise UserError(
            f"activation_checkpointing=true needs repeated blocks, and {type(model).__name__} has no ModuleList of "
            "modules of one class; put its blocks in one, or set activation_checkpointing: false."
        )
    for block in repeated:
        # Not torch's wrapper module: it would rename the parameters, and noise and checkpoints go by name. The
        # block's own hooks stay outside, so a sharded block is gathered once in the backward pass, not twice.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def class_names(config: TrainConfig) -> tuple[str, ...]:
    """The names that the model gives its classes, by label, in its folder or in `model`; empty where it names none."""
    from transformers import AutoConfig

    names: Mapping[Any, str] = {}
    if config.model is not None:
        names = config.model.get("id2label", {})
    elif config.model_name_or_path is not None:
        where = config.model_name_or_path
        with _one_line("model_name_or_path", f"model_name_or_path={where!r}"):
            alone = local_only("model_name_or_path", _folder(where))
            names = AutoConfig.from_pretrained(_folder(where), local_files_only=alone, **_SAFE).id2label or {}
    numbered = {int(label): str(name) for label, name in names.items()}
    return tuple(numbered[i] for i in range(len(numbered))) if set(numbered) == set(range(len(numbered))) else ()


def _transformer(
    config: TrainConfig, vocabulary_size: int | None, classes: int | Sequence[str] | None, *, whole: bool = False
) -> nn.Module:
    """The model by its config; `whole`: with the weights of its folder too, as transformers reads them."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
    )  # fmt: skip

    kind = AutoModelForCausalLM if config.task == "causal_lm" else AutoModelForSequenceClassification
    labels = _labels(classes) if classes is not None and config.task != "causal_lm" else {}
    safe: dict[str, Any] = dict(_SAFE)
    how: dict[str, Any] = {"attn_implementation": config.attn_implementation, "dtype": torch.float32, **_SAFE}
    if config.model is not None:
        shape = _from_scratch(config, config.model, vocabulary_size, labels)
        _check_fits(config, shape, vocabulary_size)
        with _one_line("model.model_type", f"model_type={shape.model_type!r} for task={config.task}"):
            model = kind.from_config(shape, **how)
    else:
        where = config.model_name_or_path or ""
        with _one_line("model_name_or_path", f"model_name_or_path={where!r}"):
            safe["local_files_only"] = local_only("model_name_or_path", _folder(where))
            shape = AutoConfig.from_pretrained(_folder(where), **safe, **labels)
            _refuse_quantised(where, shape)
            _check_fits(config, shape, vocabulary_size)
            if whole:
                model = kind.from_pretrained(_folder(where), config=shape, use_safetensors=True, **how)
            else:
                model = kind.from_config(shape, **how)
                if model.can_generate() and (Path(_folder(where)) / "generation_config.json").exists():
                    model.generation_config = GenerationConfig.from_pretrained(_folder(where))
    model.config.use_cache = False
    return model


def identity_of_base(config: TrainConfig) -> Identity:
    """What tells the folder that the model comes from apart from another; nothing of a model from scratch."""
    where = config.model_name_or_path
    if where is None:
        return {}
    with _one_line("model_name_or_path", f"model_name_or_path={where!r}"):
        return {f"{BASE}{name}": told for name, told in identity_of_folder(_cached_folder(where)).items()}


def _cached_folder(where: str) -> Path:
    """The folder itself, or that of a name in the local cache, which is filled from the hub if that can be reached."""
    path = Path(_folder(where))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    alone = local_only("model_name_or_path", where)
    return Path(snapshot_download(where, local_files_only=alone, allow_patterns=["*.json", "*.safetensors"]))


def _refuse_quantised(where: str, shape: Any) -> None:
    if getattr(shape, "quantization_config", None):
        raise SettingError(
            "model_name_or_path",
            f"model_name_or_path={where!r} is quantised; weights are trained in fp32 or bf16: give the model before "
            "quantisation.",
        )


def _labels(classes: int | Sequence[str]) -> dict[str, Any]:
    """The keys of a Hugging Face config that say how many classes there are, and their names."""
    if isinstance(classes, int):
        return {"num_labels": classes}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _from_scratch(
    config: TrainConfig, given: Mapping[str, Any], vocabulary_size: int | None, labels: Mapping[str, Any]
) -> Any:
    """The Hugging Face config of `model:`, what it leaves out filled in."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    model_type = given["model_type"]
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), list(CONFIG_MAPPING))
        raise SettingError("model.model_type", f"unknown model_type {model_type!r}{hint}")
    shape = CONFIG_MAPPING[model_type]
    own = set(inspect.signature(shape.__init__).parameters) - {"self", "kwargs"} | set(shape.attribute_map)
    known = own | set(PretrainedConfig().to_dict()) | {"num_labels"}
    keys = {key: value for key, value in given.items() if key != "model_type"}
    for key, value in keys.items():
        if key == "attn_implementation":
            raise SettingError(f"model.{key}", f"{key} stands beside model, not in it: {key}: {value}.")
        if key not in known:
            hint = did_you_mean(key, sorted(own))
            raise SettingError(f"model.{key}", f"{model_type} has no config key {key!r}{hint}")

    tokens = tokens_of(config)
    # A padding id in a language model would freeze that token's embedding, and the end of a document is a target.
    padding = None if config.task == "causal_lm" else tokens.padding
    filled: dict[str, Any] = {
        "vocab_size": vocabulary_size or tokens.size,
        "bos_token_id": None,
        "eos_token_id": tokens.end,
        "pad_token_id": padding,
        "use_cache": False,
        **labels,
    }
    aliases = shape.attribute_map  # GPT-2 calls hidden_size n_embd, and takes either
    hidden, heads = (keys.get(k, keys.get(aliases.get(k, k))) for k in ("hidden_size", "num_attention_heads"))
    default = {name: p.default for name, p in inspect.signature(shape.__init__).parameters.items()}
    if "intermediate_size" in own and isinstance(hidden, int):
        # Gated blocks have three matrices where others have two: 8/3 instead of 4 keeps the parameters.
        gated = default.get("hidden_act") == "silu"
        filled["intermediate_size"] = ceil(hidden * 8 / 3 / 64) * 64 if gated else 4 * hidden
    if "num_key_value_heads" in own and heads is not None:
        filled["num_key_value_heads"] = heads
    context = aliases.get("max_position_embeddings", "max_position_embeddings")
    if isinstance(default.get(context), int) and default[context] < config.block_size:
        filled[context] = config.block_size
    with _one_line("model", f"model: {{model_type: {model_type}, …}}"):
        return shape(**(filled | keys))


def _folder(where: str) -> str:
    path = Path(where).expanduser()
    if not path.exists() and (where[0] in "./~" or where.count("/") > 1):
        raise SettingError("model_name_or_path", f"model_name_or_path={where!r} does not exist.")
    return str(path)


def _check_fits(config: TrainConfig, shape: Any, vocabulary_size: int | None) -> None:
    """Ids beyond the embedding and positions beyond the table would fail inside a kernel, without a name."""
    if config.packing == "documents":
        refuse_mixed_documents(shape)
    tokens = tokens_of(config)
    size = vocabulary_size or tokens.size
    rows = getattr(shape, "vocab_size", None)
    saved = config.model_name_or_path is not None
    if rows is not None and (rows < size or (saved and isinstance(tokens, ByteTokens) and rows != size)):
        raise SettingError(
            "tokenizer_name_or_path" if saved else "model.vocab_size",
            f"the model has {rows} token ids but the tokenizer has {size}; "
            + ("give the model's own tokenizer_name_or_path." if saved else "leave vocab_size out."),
        )
    context = getattr(shape, "max_position_embeddings", None)
    if isinstance(context, int) and context < config.block_size:
        raise SettingError(
            "block_size",
            f"block_size={config.block_size} is beyond the model's max_position_embeddings={context}; lower it.",
        )


@contextmanager
def _one_line(key: str, what: str) -> Iterator[None]:
    """Whatever transformers raises about a user's model, as one line."""
    try:
        yield
    except (SettingError, Unsupported):
        raise
    except UserError as error:
        raise SettingError(key, str(error)) from None
    except Exception as error:  # OSError, ValueError, KeyError, safetensors' and validators' own, by what is wrong
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise SettingError(key, f"{what} cannot be built: {reason[:300]}") from None
