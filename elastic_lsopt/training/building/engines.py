"""From the settings to an engine: the model, where its weights lie, the base optimizer, the loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.api.initialize import initialize
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.averages import registry as averages
from elastic_lsopt.averages.average import Average
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.backends.trainable import refuse_scalars
from elastic_lsopt.checkpoint.huggingface.folder_weights import FolderWeights
from elastic_lsopt.checkpoint.huggingface.weights import fill, give_memory
from elastic_lsopt.config.deepspeed_json import check_job, read_deepspeed_json, zero_stage
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.losses.default_loss import adds_router_loss, as_loss
from elastic_lsopt.oracle.losses.loss import Loss, Unsplit, causal_lm_loss, classification_loss
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.training.building.base_optimizer import base_of
from elastic_lsopt.training.building.models import apply_activation_checkpointing, blocks, shape_and_weights
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.world import World

log = logging.getLogger("elastic_lsopt")


def build_engine(
    config: TrainConfig, method: Method, data: Data, world: World, total_samples: int, keep: Sequence[Stateful] = (),
    consensus: Consensus | None = None,
) -> Engine:  # fmt: skip
    """The engine that the settings describe (collective).

    Of a transformers model each rank fills what it holds: its shards on FSDP2 and ZeRO-3, all of it elsewhere.
    """
    classes = data.classes if data.labels_are_names else len(data.classes)
    model, weights = shape_and_weights(config, vocabulary_size=data.vocabulary_size, classes=classes or None)
    filled = None if weights is None else _unfilled if world.rehearsal else partial(fill, weights=weights)
    if isinstance(weights, FolderWeights) and world.is_first and world.generation <= 1 and not world.rehearsal:
        for line in weights.told():
            log.warning("%s", line)
    if config.task == "sequence_classification":
        data.refuse_labels_beyond(model.config.num_labels)  # type: ignore[union-attr,arg-type]
    if config.task == "causal_lm":
        _refuse_other_inputs(model, data)
    if config.activation_checkpointing:
        apply_activation_checkpointing(model)
    loss, base = loss_of(config, model), base_of(config, model)
    keep = [*keep, *averages_of(config)] if not world.rehearsal else []
    options: dict[str, Any] = {
        "seed": config.seed,
        "total_samples": total_samples,
        "keep": keep,
        "consensus": consensus,
    }
    if config.backend == "deepspeed":
        assert config.deepspeed is not None
        settings = read_deepspeed_json(config.deepspeed)
        check_job(settings, config)
        settings["bf16"] = {**settings.get("bf16", {}), "enabled": config.bf16}
        if filled is not None and zero_stage(settings) < 3:
            give_memory(model, torch.device("cpu"))  # DeepSpeed casts to bf16 before it moves the model
        return initialize(
            model=model,
            config=settings,
            method=method,
            base=base,
            loss_fn=loss,
            max_grad_norm=config.max_grad_norm,
            fill=filled,
            **options,
        )
    if config.backend == "fsdp2":
        _shard(config, model, world)
    if filled is not None:
        give_memory(model, torch.device("cpu") if config.fsdp_cpu_offload else world.device)
    elif config.backend == "replicated":
        model.to(world.device)
    if config.backend == "replicated" and world.size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    backend = backend_for(model, base(model.parameters()), max_grad_norm=config.max_grad_norm)
    if filled is not None:
        filled(backend)
    if config.bf16 and config.backend == "replicated":
        backend.compute_dtype = torch.bfloat16  # autocast rounds the weights in the forward
    return Engine(backend, method, loss_fn=loss, **options)


def _unfilled(backend: Backend) -> None:
    """A rehearsal trains nothing: alone, it would fill the whole model, and memory that is not written costs none."""


def _refuse_other_inputs(model: nn.Module, data: Data) -> None:
    """A model of the user's own may not take what a padded batch has beside its tokens."""
    inputs = sorted(set(data.collate([data.train[0]])) - {"labels"})
    try:
        inspect.signature(model.forward).bind(**dict.fromkeys(inputs))
    except TypeError as error:
        raise SettingError(
            "model.import",
            f"{type(model).__name__}.forward does not take a batch of this data, {', '.join(inputs)} ({error}); let it "
            "take them, or use packing: concatenate.",
        ) from None


def averages_of(config: TrainConfig) -> list[Average]:
    """The averages that the settings name. Raises SettingError for one that is not known or does not take its
    values."""
    made = []
    for name, given in config.averages.items():
        own = dict(given)
        path = own.pop("import", name)
        try:
            kind = averages.get(path)
            if not issubclass(kind, Average):
                raise UserError(f"{kind.__qualname__} is no lso.Average; derive it from that.")
            known = {f.name for f in fields(kind)}
            reference = {"batch": config.global_batch_size} if "batch" in known else {}
            if "name" in own:
                raise UserError(f"its name is its key, {name!r}; remove name={own['name']!r}")
            made.append(averages.build(path, **{"name": name, **reference, **own}))
        except UserError as error:
            raise SettingError(f"averages.{name}", f"averages.{name}: {error}") from None
    return made


def _shard(config: TrainConfig, model: nn.Module, world: World) -> None:
    """`fully_shard` every block, then the rest; two mesh dimensions where there are replica groups."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    refuse_scalars(model.named_parameters(), "FSDP2")
    replicas = config.fsdp_replicas
    if world.size % replicas:
        if world.plan is None:
            raise UserError(f"fsdp_replicas={replicas} must divide the {world.size} ranks of the job.")
        if world.is_first and world.generation:
            log.warning("fsdp_replicas=%d does not divide %d workers: they share one copy until it does.",
                        replicas, world.size)  # fmt: skip
        replicas = 1
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("replicate", "shard")
    else:
        shape, names = (world.size,), ("shard",)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=names),
        "reshard_after_forward": config.fsdp_reshard_after_forward,
    }
    if config.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if config.fsdp_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def as_weights_are(batch: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The batch as the engine's forward takes it: DeepSpeed's weights are bfloat16, and so must be what they meet."""
    narrow = config.bf16 and config.backend == "deepspeed"
    return {k: v.bfloat16() if narrow and v.is_floating_point() else v for k, v in batch.items()}


def plain_loss_of(config: TrainConfig, model: nn.Module) -> Loss | Unsplit:
    """The task's loss, in whatever precision the model has; with its routers' loss where the model adds one."""
    if config.task != "causal_lm":
        return classification_loss()
    return as_loss(None, model) if adds_router_loss(model) else causal_lm_loss()


def loss_of(config: TrainConfig, model: nn.Module) -> Loss | Unsplit:
    """The task's loss as the engine computes it."""
    loss = plain_loss_of(config, model)
    if not config.bf16 or config.backend == "fsdp2":
        return loss

    def cast(forward: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(model: Any, batch: Any) -> Any:
            if config.backend == "deepspeed":
                return forward(model, as_weights_are(batch, config))
            device = next(iter(batch.values())).device.type
            with torch.autocast(device, dtype=torch.bfloat16):
                return forward(model, batch)

        return run

    if isinstance(loss, Unsplit):
        return Unsplit(cast(loss.function), loss.count, None if loss.outputs is None else cast(loss.outputs))
    return Loss(cast(loss.forward), loss.criterion, loss.count)
