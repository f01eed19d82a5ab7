"""The oracle of a step whose ranks are parted into halves: each half runs the whole batch, wherever it stands.

    with space.perturbed(e) if oracle.half == 0 else space.perturbed(d):
        first, second = oracle.gradients_of_halves()      # grad L(w + e) and grad L(w + d), both on every rank

Micro-batch u is dealt to rank u mod (ranks / 2) of each half, so to two ranks, its twins: the same samples, weight and
dropout. A pass with all ranks at one point (`gradient`) is right too, and each micro-batch is run twice in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.oracle.oracle import Part, Pass
from elastic_lsopt.oracle.replay.buffers import moving_buffers
from elastic_lsopt.oracle.split.sample_losses import SampleLosses
from elastic_lsopt.oracle.step_report import Piggyback
from elastic_lsopt.space.geometry import local_square
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.space.vector import BorrowedGradient, Vector

MARKS = 2**26
"""Marks of micro-batches are below this: fp64 adds them up exactly over any number of ranks."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class HalvesOracle(MicroBatchOracle):
    """`gradients_of_halves` is one pass by the clock, and two gradients of the batch in `passes` and `losses`.

    Communication: the gradients once within each half, once between twins, and one all-reduce of six numbers. Memory:
    one Vector. Raises UserError where twins were given different micro-batches.
    """

    copies: ClassVar[int] = 2
    _apart = False
    """The pass that runs is one of two halves."""

    @staticmethod
    def dealt_as(backend: GradientEngine) -> tuple[int, int]:
        ranks = backend.world // 2
        return backend.rank % ranks, ranks

    @property
    def half(self) -> int:
        assert self.backend.half is not None
        return self.backend.half

    def gradients_of_halves(self) -> tuple[Vector, BorrowedGradient]:
        """As there; the first may be written to, the second is borrowed. Raises NonFinite as `gradient` does.

        Raises UserError for a model whose forward moves buffers, of which each half would have its own.
        """
        before = moving_buffers(self.backend.roots) if self.moves_buffers and not self.backend.still else None
        self._apart = True
        try:
            with self.accumulating() as total:
                for part in self.parts(1):
                    part.backward()
                if before is not None:
                    self._refuse_moved(before)
        finally:
            self._apart = False
        return self._at_first, total.gradient

    def gradient_of_risen(self, before: SampleLosses, after: SampleLosses, gamma: float) -> BorrowedGradient:
        raise UserError("samples are not chosen by their losses where each is run in both halves; set halves=False.")

    def _refuse_moved(self, before: Mapping[str, Tensor]) -> None:
        for name, now in moving_buffers(self.backend.roots).items():
            if name not in before or not torch.equal(now, before[name]):
                raise UserError(
                    f"halves=True: the forward moves the model's buffer {name}, of which each half of the ranks would "
                    "have one of its own; put its layer in eval mode, or set halves=False."
                )
        self.backend.still = True

    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        return super()._backward(part, last=last and not self._apart)

    def _close(self, total: Pass, alone: Part | None) -> None:
        if not self._apart:
            super()._close(total, alone)
            return
        self.begun += 1
        gradients = self.backend.gradients_of_halves()
        losses: list[float | Tensor] = [0.0, 0.0]
        losses[self.half] = total.local_loss * self.copies
        # Every rank has both gradients, so a sum over all ranks counts each so often.
        squares = [local_square(g) / self.backend.world for g in gradients]
        asked = self._stop_requested is not None and self._stop_requested()
        riding = self._own_piggyback().numbers if self._own_piggyback is not None else []
        values = on_device([*losses, *squares, total.nonfinite, asked, *riding], self.backend.compute_device)
        *both, nonfinite, stop = (sums := self.backend.sum_replica_(values).tolist())[:6]
        self.stop = self.stop or stop > 0
        self.piggyback = Piggyback.of(sums[6:]) if riding else None
        for loss, square in zip(both[:2], both[2:], strict=True):
            self._first.setdefault(None, (1.0, loss))
            self._swept += 1.0
            self.losses.append(loss)
            if nonfinite or not math.isfinite(loss) or not math.isfinite(square):
                raise NonFinite(
                    f"step {self.step}, pass {self.passes}: loss {loss}, gradient norm {math.sqrt(abs(square))}"
                )
        total.loss = both[0]
        first, second = gradients
        self._at_first = Vector(self.space, first)
        total._gradient = self.space.lend(second, math.sqrt(both[3]))

    # -- twins -------------------------------------------------------------------------------------------------

    def _marks(self) -> Sequence[float | Tensor]:
        """One for each pair of twins, which add theirs with opposite signs."""
        own: float | Tensor = 0.0
        for index, unit in self._microbatches.items():
            own = own + (index + 1) * (1 + mark(unit.batch))
        own = own % MARKS
        return [own * (1 - 2 * self.half) if r == self._rank else 0.0 for r in range(self._ranks)]

    def _compare(self, marks: Sequence[float]) -> None:
        if differing := sum(m != 0 for m in marks):
            raise UserError(
                f"{differing} rank(s) of the first half got other micro-batches than their twins in the second: "
                f"with halves=True ranks r and r + {self._ranks} run the same ones; deal them by engine.deal."
            )


def mark(batch: Any) -> int | Tensor:
    """A number that says what is in the tensors of a batch, bit for bit and in their order, below MARKS.

    Left on the device: reading it would wait.
    """
    found: int | Tensor = 0
    for place, t in enumerate((t.detach().contiguous() for t in _tensors(batch) if t.numel()), 1):
        bits = t.view(INTEGERS.get(t.element_size(), torch.int64)) if t.dim() else t.reshape(1).view(torch.uint8)
        rows = bits.reshape(len(bits), -1).sum(1, dtype=torch.int64)
        weights = torch.arange(1, len(rows) + 1, device=rows.device)
        found = (found + place * ((rows % MARKS) * weights).sum()) % MARKS
    return found


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
