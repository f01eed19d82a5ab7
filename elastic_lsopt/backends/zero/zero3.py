"""ZeRO stage 3: each parameter cut into equal parts over the ranks, gathered module by module around its use.

    sub-group 0, this rank's slot     [ a.weight, part | a.bias, part, padding | b.weight, part ]

The working copy is the part that a gather reads, the master an fp32 copy of it (DeepSpeed 0.19.8 makes one in fp32 too;
where it does not, a perturbation keeps a shard). Small parameters stay gathered between steps
(`persistent_parameters`): they are dropped before an edit of the working copy and gathered again after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import Tensor

from elastic_lsopt.backends.zero.zero_backend import ZeroBackend
from elastic_lsopt.space.layout import Piece


class Zero3(ZeroBackend):
    """DeepSpeedZeroOptimizer_Stage3 in fp32 and bf16; the slots are the flat masters, one a sub-group.

    The gradient lies in one flat buffer that DeepSpeed keeps for the engine's life.
    """

    name = "zero3"

    @property
    def separate_master(self) -> bool:
        return any(
            low.data_ptr() != high.data_ptr() for low, high in zip(self._working_slots, self.slot_keys, strict=True)
        )

    @property
    def _groups(self) -> Sequence[Sequence[Any]]:
        return self._wrapper.fp16_groups

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return self._wrapper.fp32_partitioned_groups_flat

    @property
    def _working_slots(self) -> Sequence[Tensor]:
        return self._wrapper.fp16_partitioned_groups_flat

    def _pieces(self) -> list[Piece]:
        pieces = []
        for slot, group in enumerate(self._groups):
            start = 0
            for p in group:
                size = p.partition_numel()
                offset = self.rank * size
                if length := max(0, min(size, p.ds_numel - offset)):  # what is left of the part is padding
                    pieces.append(Piece(self._number[id(p)], offset, length, slot, start))
                start += size
        return pieces

    def group_of(self, piece: Piece) -> dict[str, Any]:
        return self.param_groups[self._wrapper.sub_group_to_group_id[piece.slot]]

    def drop_gathered(self) -> None:
        module: Any = self.module
        broken: Exception | None = None
        for _ in range(1 + sum(1 for _ in module.parameters())):
            try:
                self._wrapper._partition_all_parameters()
                return
            except (RuntimeError, AssertionError) as error:
                # A gather that a dead peer broke can neither be waited for nor released: forget it, and try the next.
                broken = error
                for p in module.parameters():
                    if p.ds_status == ZeroParamStatus.INFLIGHT:
                        p.ds_status = ZeroParamStatus.NOT_AVAILABLE
        assert broken is not None
        raise broken

    def refresh_gathered(self) -> None:
        kept = self._wrapper.persistent_parameters
        # One gather for all, as after DeepSpeed's step: the forward would fetch them one module at a time. After a cut
        # it can fetch nothing, so none runs: with every gathered copy dropped, no copy is wrong.
        if kept and self.transport.settle_group is None:
            kept[0].all_gather(kept)

    def clear_gradient(self) -> None:
        # After zero_grad the next backward overwrites the buffer, but only where it writes at all: a parameter that it
        # does not use would step with the gradient of an earlier pass.
        self._wrapper.zero_grad(set_to_none=True)
        self._wrapper.grad_partitions_flat_buffer.zero_()

    def gradients(self) -> list[Tensor]:
        return self.views(self._flat_gradients)

    @property
    def _flat_gradients(self) -> Sequence[Tensor]:
        return self._wrapper.grad_partitions_flat_buffer.split([slot.numel() for slot in self.slots])

    def full_shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def part_of(self, parameter: Any) -> tuple[int, Tensor]:
        offset = self.rank * parameter.partition_numel()
        held = max(0, min(parameter.partition_numel(), parameter.ds_numel - offset))
        return offset, parameter.ds_tensor.detach().view(-1)[:held]

    def full_parameter(self, parameter: Any) -> Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def repair(self) -> None:
        super().repair()
        self.drop_gathered()
        for bucket in self._wrapper.ipg_buckets.values():
            bucket.clear_params()
        module: Any = self.module
        for p in module.parameters():
            p.grad = None  # zero_grad() fails on one that is left: it wants a stream, which a CPU has not
        self._wrapper._backward_active_depth = 0
        self.clear_gradient()
