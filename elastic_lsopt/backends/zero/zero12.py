"""ZeRO stages 1 and 2: whole weights on each rank in one flat buffer a group, fp32 masters and optimizer state sharded.

    group 0, flat     [ a.weight ......... | a.bias | b.weight ... pad ]     every rank
    rank 1's part                  [ .............. ]                        its master: a flat fp32 copy of this

The working copy is this rank's part of the flat buffer; `refresh_gathered` gathers all parts into it, as DeepSpeed's
step does. A perturbation is rebuilt from the master, so it needs no memory.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.backends.zero.zero_backend import ZeroBackend
from elastic_lsopt.space.layout import Piece
from elastic_lsopt.space.vector import Vector


class FlatZero(ZeroBackend):
    """What the two wrappers of stages 1 and 2 have in common; the slots are the flat fp32 masters, one a group."""

    separate_master = True  # type: ignore[assignment]

    @property
    @abstractmethod
    def _flats(self) -> Sequence[Tensor]:
        """The whole flat buffers, one a group, in which the model's parameters lie."""

    def _pieces(self) -> list[Piece]:
        pieces = []
        for slot, (flat, group) in enumerate(zip(self._flats, self._groups, strict=True)):
            size = flat.numel() // self.world
            first, end = self.rank * size, (self.rank + 1) * size
            for p in group:
                # DeepSpeed makes each parameter a view of the flat buffer: its place is read there, whatever the order.
                at = p.storage_offset() - flat.storage_offset()
                begin, stop = max(at, first), min(at + p.numel(), end)
                if begin < stop:
                    pieces.append(Piece(self._number[id(p)], begin - at, stop - begin, slot, begin - first))
        return pieces

    @property
    def _working_slots(self) -> list[Tensor]:
        return [flat.chunk(self.world)[self.rank] for flat in self._flats]

    def drop_gathered(self) -> None:
        """The gathered copy is the flat buffer itself, written in place."""

    @torch.no_grad()
    def refresh_gathered(self) -> None:
        self._gather(self._flats)

    def _gather(self, flats: Sequence[Tensor]) -> None:
        """Each rank's part of each flat tensor to all ranks."""
        for flat in flats:
            own = flat.detach().chunk(self.world)[self.rank]
            if self.transport.settle_group is not None:
                # See [Note: cutting the transport]: DeepSpeed's groups are gone.
                flat.detach().copy_(torch.cat(self.transport.gather(own)))
            elif self.world > 1:
                dist.all_gather_into_tensor(flat.detach(), own, group=self.shard_group)

    def repair(self) -> None:
        super().repair()
        self._wrapper._backward_active_depth = 0


class Zero12(FlatZero):
    """DeepSpeedZeroOptimizer: stages 1 and 2 in fp32 and bf16.

    The gradient is this rank's part of the reduced gradients, in tensors that DeepSpeed makes anew in each pass.
    """

    name = "zero12"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._reduces_each = engine.zero_optimization_stage() == 2
        self._as_ready = self._reduces_each or self._wrapper.overlap_comm
        """Gradients are reduced in the order in which they are ready, else in that of the parameters."""
        self._got: list[int] = []
        self._used = 0
        for number, p in enumerate(self._parameters.values()):
            p.register_post_accumulate_grad_hook(partial(_note, self._got, number))

    @property
    def _groups(self) -> Sequence[Sequence[Any]]:
        return self._wrapper.bit16_groups

    @property
    def _flats(self) -> Sequence[Tensor]:
        return self._wrapper.bit16_groups_flat

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return self._wrapper.single_partition_of_fp32_groups

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if self._as_ready:  # else stage 1 reduces at the end what any micro-batch has left
            self._close_round()

    def used(self) -> int:
        self._close_round()
        return self._used

    def _close_round(self) -> None:
        """DeepSpeed reduces buckets of what this rank has a gradient for, and nothing else."""
        if self._got:
            order = self._got if self._as_ready else sorted(set(self._got))
            self._used = crc32(array("I", order).tobytes(), self._used)
            self._got.clear()

    def clear_gradient(self) -> None:
        self._used = 0
        self._got.clear()
        z = self._wrapper
        z.zero_grad(set_to_none=True)
        for i in range(len(self._flats)):
            z.averaged_gradients[i] = z.all_grad_tensors[i] = None

    def gradients(self) -> list[Tensor]:
        runs = [self._runs(i) for i in range(len(self._flats))]
        return [runs[p.slot][p.start][: p.length] for p in self.layout.pieces]

    def _runs(self, i: int) -> dict[int, Tensor]:
        """Group i's gradient by its place in this rank's part: a tensor a parameter, padding between them."""
        at, runs = 0, {}
        for t in self._wrapper.averaged_gradients[i]:
            runs[at] = t.detach().view(-1)
            at += t.numel()
        return runs

    def repair(self) -> None:
        super().repair()
        z = self._wrapper
        z.params_already_reduced = [False] * len(z.params_already_reduced)
        for bucket in z.ipg_buckets.values():
            bucket.clear()
        z._release_ipg_buffers()
        self.clear_gradient()


class Bf16Zero1(FlatZero):
    """BF16_Optimizer: stage 1 in bf16 with `data_types: {grad_accum_dtype: fp32}`.

    Each rank keeps the whole gradient in fp32, reduced everywhere, and steps with its part of it.
    """

    name = "zero12"

    @property
    def _groups(self) -> Sequence[Sequence[Any]]:
        return self._wrapper.bf16_groups

    @property
    def _flats(self) -> Sequence[Tensor]:
        return self._wrapper.bf16_groups_flat

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return self._wrapper.fp32_groups_flat_partition

    def clear_gradient(self) -> None:
        self._wrapper.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        return self.views(self._wrapper.fp32_groups_gradient_flat_partition)

    def install(self, vector: Vector) -> None:
        super().install(vector)
        self._gather(self._wrapper.fp32_groups_gradients_flat)

    def step(self, gradient: Vector, norm: float | None) -> None:
        # It clips by a norm taken over its own copy of what it saw a gradient for: a parameter that one rank did not
        # use would give the ranks different norms, and an installed gradient would go unclipped.
        for seen in self._wrapper.fp32_groups_has_gradients:
            seen[:] = [True] * len(seen)
        super().step(gradient, norm)

    def repair(self) -> None:
        super().repair()
        self.clear_gradient()


def _note(got: list[int], number: int, _: Tensor) -> None:
    got.append(number)
