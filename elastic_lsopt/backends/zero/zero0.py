"""DeepSpeed without ZeRO (stage 0): every rank holds all; in bf16 beside an fp32 master a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from elastic_lsopt.backends.zero.zero_backend import ZeroBackend
from elastic_lsopt.space.layout import Piece


class Zero0(ZeroBackend):
    """The bare base optimizer (fp32), or FP16_UnfusedOptimizer (bf16); the slots are the masters, one a parameter."""

    name = "zero0"
    flat = False

    def __init__(self, engine: Any) -> None:
        self._masters = getattr(engine.optimizer, "fp32_groups", None)
        super().__init__(engine)
        self.shard_group, self.holders = None, self.world

    @property
    def separate_master(self) -> bool:
        return self._masters is not None

    @property
    def _groups(self) -> list[list[Any]]:
        groups = self._wrapper.fp16_groups if self._masters else [g["params"] for g in self.base.param_groups]
        return [[p] for group in groups for p in group if p.requires_grad]

    @property
    def _working_slots(self) -> list[Tensor]:
        return [p for [p] in self._groups]

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return [p for group in self._masters for p in group] if self._masters else self._working_slots

    def _pieces(self) -> list[Piece]:
        return [Piece(self._number[id(p)], 0, p.numel(), slot, 0) for slot, [p] in enumerate(self._groups)]

    def drop_gathered(self) -> None:
        """There are no gathered copies."""

    def refresh_gathered(self) -> None:
        """There are no gathered copies."""

    def clear_gradient(self) -> None:
        for p in self._working_slots:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        # DeepSpeed reduces zeros for a parameter that took no part, so each has a gradient after a pass.
        return [p.grad.detach().view(-1) for p in self._working_slots]  # type: ignore[union-attr]
