"""What the ZeRO adapters share: the version check, the engine's passes and step. `adapter.py` chooses among them.

An adapter a wrapper class that DeepSpeed puts around the base optimizer:

    stage 0        none (fp32), FP16_UnfusedOptimizer (bf16)                         zero0.py
    stages 1, 2    DeepSpeedZeroOptimizer, BF16_Optimizer (1, bf16 summed in fp32)   zero12.py
    stage 3        DeepSpeedZeroOptimizer_Stage3                                     zero3.py
    1 to 3         the same two, with the optimizer on the host                      zero_offload.py

[Note: whose arithmetic] DeepSpeed is told a micro-batch of 1 and an accumulation of 1. The oracle weighs each
micro-batch and says which backward closes the pass; DeepSpeed averages over the data-parallel ranks, clips what it
finds in its buffer and steps once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.base_trial import reason_against_flat
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.errors import NonFinite, Unsupported, UserError
from elastic_lsopt.space.layout import Layout, Parameter, Piece, plain_name
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of

VERSIONS = ("0.19.8",)
# All that is read or written of DeepSpeed beyond its documented interface, by class. Nothing else may be used.
PRIVATE = {
    "DeepSpeedEngine": (
        "_config", "_is_gradient_accumulation_boundary", "dp_world_size", "sequence_parallel_size",
        "pipeline_parallelism", "has_moe_layers", "mpu",
    ),
    "FP16_UnfusedOptimizer": ("optimizer", "fp16_groups", "fp32_groups"),
    "DeepSpeedZeroOptimizer": (
        "optimizer", "bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "averaged_gradients",
        "all_grad_tensors", "ipg_buckets", "params_already_reduced", "overlap_comm",
        "_release_ipg_buffers", "_backward_active_depth",
    ),
    "BF16_Optimizer": (
        "optimizer", "bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition",
        "fp32_groups_gradients_flat", "fp32_groups_gradient_flat_partition", "fp32_groups_has_gradients",
        "_backward_active_depth",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "sub_group_to_group_id",
        "optimizer", "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer", "persistent_parameters", "_partition_all_parameters",
        "ipg_buckets", "_backward_active_depth",
    ),
    "offloaded DeepSpeedZeroOptimizer": (
        "norm_for_param_grads", "accumulated_grads_in_cpu", "micro_step_id", "reset_cpu_buffers",
        "finalize_gradient_accumulation_boundary", "_wait_for_offload_copies", "get_param_id",
    ),
    "offloaded DeepSpeedZeroOptimizer_Stage3": ("norm_for_param_grads", "reset_cpu_buffers", "get_param_id"),
    "Parameter": ("ds_shape", "ds_numel", "ds_status", "partition_numel", "all_gather"),
}  # fmt: skip


def check_version() -> None:
    """Raise Unsupported for a DeepSpeed whose insides no test of ours has seen."""
    if deepspeed.__version__ not in VERSIONS:
        raise Unsupported(
            f"DeepSpeed {deepspeed.__version__} was found; its insides are used, and tested for {', '.join(VERSIONS)} "
            f"only: pip install deepspeed=={VERSIONS[-1]}."
        )


def check_private(thing: Any, kind: str) -> None:
    """Raise Unsupported, naming them, where attributes that we need are not there (a patched or forked DeepSpeed)."""
    if missing := [name for name in PRIVATE[kind] if not hasattr(thing, name)]:
        raise Unsupported(
            f"DeepSpeed {deepspeed.__version__}: {kind} has no {', '.join(missing)}; "
            f"use an unchanged deepspeed=={VERSIONS[-1]}."
        )


class ZeroBackend(Backend):
    """A DeepSpeed engine at one point of its life; `engine` is DeepSpeed's own.

    Raises UserError where a trainable parameter is in no group of the base optimizer, Unsupported for parameters that
    are not all in the engine's precision.
    """

    flat = True
    """Whether the base gets flat pieces of many parameters, and not each parameter whole."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module = engine.module
        self.transport = Transport()
        self.rank, self.world = self.transport.rank, self.transport.world
        self.holders = 1
        self.shard_group = self.groups.replica.handle
        self.compute_dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        self._wrapper = engine.optimizer
        self.device = self.slot_keys[0].device
        named = [(plain_name(n), p) for n, p in engine.module.named_parameters() if p.requires_grad]
        self._parameters = dict(named)
        self.max_grad_norm = engine.gradient_clipping()
        self._number = {id(p): i for i, (_, p) in enumerate(named)}
        self._refuse_parameters(named)
        self.layout = Layout(
            tuple(Parameter(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in named), tuple(self._pieces())
        )

    def _refuse_parameters(self, named: Sequence[tuple[str, Any]]) -> None:
        if not named:
            raise UserError("the model has no trainable parameter; set requires_grad on at least one.")
        held = {id(p) for group in self._groups for p in group}
        for name, p in named:
            if id(p) not in held and getattr(p, "ds_numel", p.numel()):
                raise UserError(
                    f"parameter {name} is trainable but in no group of the base optimizer; "
                    "give it all trainable parameters, or set requires_grad to False on this one."
                )
            if p.dtype != self.compute_dtype:
                raise Unsupported(
                    f"parameter {name} is {p.dtype} and the engine computes in {self.compute_dtype}: "
                    "supported are models in one precision, fp32 or bf16."
                )

    @property
    @abstractmethod
    def _groups(self) -> Sequence[Sequence[Any]]:
        """The model's parameters as the wrapper groups them: one list a slot."""

    @abstractmethod
    def _pieces(self) -> Sequence[Piece]:
        """Where this rank's runs of the parameters are in the slots."""

    @property
    @abstractmethod
    def _working_slots(self) -> Sequence[Tensor]:
        """What the forward sees of the slots: this rank's own part."""

    def refuse_base(self) -> None:
        super().refuse_base()
        if not self.flat or updates_of(self.base) is not None:
            return
        dims = [len(p.shape) for p in self.layout.parameters]
        if reason := reason_against_flat(self.base, dims, self.device):
            stage = self.engine.zero_optimization_stage()
            raise Unsupported(
                f"base {type(self.base).__name__} needs whole parameters and ZeRO stage {stage} gives it flat pieces: "
                f"{reason}; use one that works element by element (SGD, Adam, AdamW …), or stage 0."
            )

    @property
    def compute_device(self) -> torch.device:
        return self.engine.device

    @property
    def base(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return getattr(self._wrapper, "optimizer", self._wrapper)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._parameters

    @property
    def slots(self) -> list[Tensor]:
        return [key.detach() for key in self.slot_keys]

    @property
    def working(self) -> list[Tensor]:
        return self.views([t.detach() for t in self._working_slots])

    @property
    def forward(self) -> Any:
        return self.engine

    def begin(self, *, last: bool) -> None:
        self.transport.refuse_cut()
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def install(self, vector: Vector) -> None:
        for mine, t in zip(self.gradients(), vector.tensors, strict=True):
            mine.copy_(t)

    def step(self, gradient: Vector, norm: float | None) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self.engine._is_gradient_accumulation_boundary = None  # back to DeepSpeed's own count, for who uses it directly
        if not self.engine.was_step_applied():
            raise NonFinite(f"DeepSpeed skipped the step: a gradient of norm {norm} overflows its fp32 sum of squares.")
