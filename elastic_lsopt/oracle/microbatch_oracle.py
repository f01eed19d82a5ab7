"""The oracle of an engine that owns the passes: whole micro-batches, exact weights, the same dropout in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.curvature.curvature_checks import check_products
from elastic_lsopt.oracle.curvature.differences import Product
from elastic_lsopt.oracle.curvature.products import Mode, Products, refuse_unknown
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.losses.loss import Loss, refuse_coupled_samples, samples
from elastic_lsopt.oracle.microbatch import MicroBatch, as_microbatches, part_bounds, slots
from elastic_lsopt.oracle.observation import HowProducts, signs
from elastic_lsopt.oracle.oracle import Oracle, Part
from elastic_lsopt.oracle.replay.buffers import still_buffers
from elastic_lsopt.oracle.replay.forward_time import ForwardTime
from elastic_lsopt.oracle.replay.slot import Slot, replayed
from elastic_lsopt.oracle.split.logits import NO_LOGITS, OutputGradients, pulled
from elastic_lsopt.oracle.split.sample_losses import Chosen, SampleLosses, risen
from elastic_lsopt.oracle.step_report import Piggyback
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.random.noise import block_seed
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.space.vector import BorrowedGradient, Vector

Objective = Callable[[Slot, int], tuple[Tensor, Tensor]]
"""(a micro-batch that counts, its place) -> its loss, and the number whose gradient is that of the pass."""


class MicroBatchOracle(Oracle):
    """The mean loss over this step's micro-batches, given whole to ranks; see `oracle/microbatch.py`.

    Each micro-batch is weighed by its count of samples or unmasked tokens. Its dropout depends on (seed, step, index),
    so a second pass, another rank and another world size see the same masks. `samples` counts the global batch. Making
    one costs one all-reduce of 5 + world numbers. Raises UserError where a rank has no micro-batch, or another's.
    """

    copies: ClassVar[int] = 1
    """How many ranks run each micro-batch."""

    def __init__(
        self,
        space: ParameterSpace,
        backend: GradientEngine,
        loss: Loss | Any,
        microbatches: Sequence[Any],
        clock: SampleClock,
        *,
        stop_requested: Callable[[], bool] | None = None,
        piggyback: Callable[[], Piggyback] | None = None,
        products: Mode = "auto",
        checked: bool = False,
    ) -> None:
        super().__init__(space, backend, clock, stop_requested=stop_requested, piggyback=piggyback)
        refuse_unknown(products)
        if backend.module is not None:
            refuse_coupled_samples(backend.module)
        self._loss = loss
        self._rank, self._ranks = self.dealt_as(backend)
        microbatches = as_microbatches(microbatches, self._rank, self._ranks, backend.replica, backend.replicas)
        self._microbatches = {u.at: u for u in microbatches if not u.idle}
        """By their places in the replica."""
        self._stand_in = microbatches[0].batch if microbatches else None
        self._weights: dict[int, float] = {}
        self._time = ForwardTime(backend.compute_device)
        self._unit_samples = {i: samples(u.batch) for i, u in self._microbatches.items()}
        self._agree(microbatches)
        self._mode: Mode = products
        self._checked = checked
        self._curvature: Products | None = None
        self._objective: Objective | None = None
        self._chosen: dict[int, Chosen] | None = None
        """In place of whole micro-batches, some of their samples."""

    @staticmethod
    def dealt_as(backend: GradientEngine) -> tuple[int, int]:
        """(rank, ranks): micro-batch u of the replica is dealt to rank u mod ranks."""
        return backend.rank, backend.world

    @property
    def products(self) -> Products:
        """What `hvp` and `ggn_vp` ask: the mode that was chosen, and `close()` to free its memory.

        Made, and checked, when it is asked for first; who fails a check fails it each time.
        """
        if self._curvature is None:
            slots = [self._slot(index) for index in self._slots((0, self._count))]
            made = Products(self.space, self.backend, self._loss, slots, self._mode)
            if self._checked:
                try:
                    check_products(made, self.gradient)
                finally:
                    self.space.end_borrowed()
                    self.backend.clear_gradient()
            self._curvature = made
        return self._curvature

    @property
    def made_products(self) -> bool:
        """Whether any product was asked for, so that the checks have run."""
        return self._curvature is not None

    @property
    def mode(self) -> Mode:
        """How products are made: what the checks have settled, or before the first product what was asked for."""
        asked = self._mode
        return "differences" if self._curvature is not None and self._curvature.chosen == "differences" else asked

    def close_products(self) -> None:
        """Free what products hold, if any was made."""
        if self._curvature is not None:
            self._curvature.close()

    def hvp(self, v: Vector) -> Product:
        v = self._outliving(v)
        return self.products.hvp(v)

    def ggn_vp(self, v: Vector) -> Product:
        v = self._outliving(v)
        return self.products.ggn_vp(v)

    def hessian_diagonal(self, how: HowProducts) -> Vector:
        z = signs(self.space, self.step)
        slots = [self._slot(index) for index in self._slots((0, self._count))]
        made = Products(self.space, self.backend, self._loss, slots, how.mode, once=True)
        try:
            if not how.checked:
                check_products(made, self.gradient)
                how.mode, how.checked = "differences" if made.chosen == "differences" else how.mode, True
            return made.hvp(z).mul_(z)
        finally:
            made.close()
            self.space.end_borrowed()
            self.backend.clear_gradient()

    def sampled_gradient(self) -> BorrowedGradient:
        loss = self._loss
        if not isinstance(loss, Loss) or loss.sample is None:
            raise UserError("labels are drawn by lso.Loss(forward, criterion, count, sample=…); give one as loss_fn.")
        sample = loss.sample

        def objective(slot: Slot, at: int) -> tuple[Tensor, Tensor]:
            """With labels that are drawn by (seed, step, micro-batch), so the same on any rank."""
            logits = self._logits(slot)
            seed = block_seed(self.space.seed, "labels", self.step, self._microbatches[at].index)
            with torch.no_grad(), replayed(seed, self.backend.compute_device):
                drawn = sample(logits.detach(), slot.batch)
            value = loss.criterion(logits, drawn)
            return value, value

        return self._by_logits(objective)

    @contextmanager
    def aside(self) -> Iterator[None]:
        kept = self._objective, self._chosen
        self._objective = self._chosen = None
        try:
            with super().aside():
                yield
        finally:
            self._objective, self._chosen = kept

    def _outliving(self, v: Vector) -> Vector:
        """A gradient that is only lent would end with the checks' own passes."""
        return v.clone() if isinstance(v, BorrowedGradient) and self._checked and self._curvature is None else v

    def _agree(self, microbatches: Sequence[MicroBatch]) -> None:
        """All ranks learn the total weight, the number of micro-batches, and whether a rank has nothing to run."""
        world, rank, ranks = self.backend.world, self.backend.rank, self._ranks
        given = [u.at for u in microbatches if not u.idle]
        counts = [
            self._loss.count(u.batch) for u in self._microbatches.values()
        ]  # on a GPU not read yet: that would wait
        own = [
            sum(counts),
            sum(self._unit_samples.values()),
            not microbatches,
            any(u < 0 or u % ranks != self._rank for u in given),
            len(given) - len(self._microbatches),
            *(max(self._microbatches, default=-1) + 1 if r == rank else 0 for r in range(world)),
            *(marks := self._marks()),
        ]
        sums = self.backend.sum_replica_(on_device(own, self.backend.compute_device))
        both = torch.cat([sums, on_device(counts, self.backend.compute_device)]).tolist()
        total, number, empty, misplaced, twice, *ends = both[: 5 + world]
        self._weights = dict(zip(self._microbatches, both[len(own) :], strict=True))
        self._count, self._evenly = int(max(ends)), not misplaced
        if misplaced and not self._each_once():
            raise UserError(
                f"{int(misplaced)} rank(s) got a micro-batch that is another's: micro-batch u belongs to rank "
                f"u mod {ranks}{' of each half' if self.copies > 1 else ''}."
            )
        if twice:
            raise UserError(
                f"{int(twice)} micro-batch(s) share the index of another; every micro-batch needs an index of its own."
            )
        self._compare(both[5 + world : 5 + world + len(marks)])
        if empty:
            raise UserError(
                f"{int(empty)} of {world} ranks got no micro-batch; give every rank at least one (or Unit(idle=True))."
            )
        if not total > 0:
            raise UserError(
                f"the total weight of the global batch is {total}; it must be > 0 (are all labels masked?)."
            )
        self._total, self.samples = total, int(number) // self.copies

    def _marks(self) -> Sequence[float | Tensor]:
        """Numbers that are summed over the ranks with the others, for `_compare`."""
        return ()

    def _compare(self, marks: Sequence[float]) -> None:
        """Raise UserError for sums that show ranks that were dealt wrong."""

    def _each_once(self) -> bool:
        """Whether the ranks hold each micro-batch once in shares of their own, as a plan for unequal ranks deals them.

        Only where every rank holds all weights: there no forward waits for another rank. One all-reduce of a number a
        micro-batch.
        """
        if self.backend.holders < self.backend.world or self.copies > 1:
            return False
        held = torch.zeros(self._count + 1, dtype=torch.float64, device=self.backend.compute_device)
        for index in self._microbatches:
            held[index if index >= 0 else self._count] += 1
        *microbatches, below = self.backend.sum_replica_(held).tolist()
        return not below and all(ranks == 1 for ranks in microbatches)

    def _slots(self, bounds: tuple[int, int]) -> list[int | None]:
        """This rank's forwards for one part; None is an idle slot."""
        if self._evenly:
            return slots(bounds, self._rank, self._ranks)
        first, end = bounds
        # At least one: the backward that closes a pass is each rank's.
        return [*sorted(u for u in self._microbatches if first <= u < end)] or [None]

    @property
    def weight(self) -> float:
        """The total weight of the global batch: its samples or unmasked tokens."""
        return self._total / self.copies

    def parts(self, m: int) -> list[Part]:
        return [
            Part(self, i, m, (end - first) / self._count) for i, (first, end) in enumerate(part_bounds(self._count, m))
        ]

    def loss(self) -> float:
        return self._mean(lambda slot: slot.value(self._loss, self.backend.forward, self.backend.compute_device))

    def mean_over_logits(self, function: Callable[[Tensor, Any], Tensor]) -> float:
        """The mean of `function(logits, batch)`, a mean over a micro-batch, weighed as the loss is (collective; one
        forward).

        Raises UserError for a loss that is not split: then nobody knows what the logits are.
        """
        loss = self._split

        def value(slot: Slot) -> Tensor:
            logits = slot.logits(loss, self.backend.forward, self.backend.compute_device)
            return function(logits, slot.batch) if slot.share else logits

        return self._mean(value)

    def _mean(self, value: Callable[[Slot], Tensor]) -> float:
        """The mean of a slot's value over the global batch, without gradients."""
        self.space.copies.ready()
        local: float | Tensor = 0.0
        with torch.no_grad(), still_buffers(self.backend.roots):
            for index in self._slots((0, self._count)):
                slot = self._slot(index)
                found = value(slot)
                if slot.share:
                    local = local + _exact(found) * slot.share
        return self.backend.sum_replica_(on_device([local], self.backend.compute_device)).item()

    def gradient_and_pull(self) -> tuple[BorrowedGradient, OutputGradients]:
        kept = OutputGradients()
        return self._by_logits(lambda slot, at: self._kept(kept, slot, at)), kept

    def pullback(self, by_outputs: OutputGradients) -> BorrowedGradient:
        def pull(slot: Slot, at: int) -> tuple[Tensor, Tensor]:
            value = pulled(by_outputs.of[at], self._logits(slot))
            return value, value

        return self._by_logits(pull)

    def gradient_and_sample_losses(self) -> tuple[BorrowedGradient, SampleLosses]:
        losses = SampleLosses()

        def objective(slot: Slot, at: int) -> tuple[Tensor, Tensor]:
            logits = self._logits(slot)
            losses.note(at, self._split, logits, slot.batch)
            value = self._split.criterion(logits, slot.batch)
            return value, value

        return self._by_logits(objective), losses

    def sample_losses(self) -> SampleLosses:
        losses = SampleLosses()
        self.space.copies.ready()
        with torch.no_grad(), still_buffers(self.backend.roots):
            for at in self._slots((0, self._count)):
                slot = self._slot(at)
                logits = self._logits(slot)
                if slot.share and at is not None:
                    losses.note(at, self._split, logits, slot.batch)
        return losses

    def gradient_of_risen(self, before: SampleLosses, after: SampleLosses, gamma: float) -> BorrowedGradient:
        batches = {at: unit.batch for at, unit in self._microbatches.items()}
        device = self.backend.compute_device
        self._chosen = risen(before, after, batches, self._count, gamma, self.backend.sum_replica_, device)
        swept = self._swept
        try:
            return self.gradient()
        finally:
            self._swept, self._chosen = swept + gamma, None

    def _by_logits(self, objective: Objective) -> BorrowedGradient:
        """A pass whose micro-batches go backward from what `objective` makes of their logits."""
        self._objective = objective
        try:
            return self.gradient()
        finally:
            self._objective = None

    def _kept(self, kept: OutputGradients, slot: Slot, at: int) -> tuple[Tensor, Tensor]:
        """The loss, and what leads backward through the gradient by the logits, which is kept."""
        logits = self._logits(slot)
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            value = self._split.criterion(z, slot.batch)
            [kept.of[at]] = torch.autograd.grad(value, z)
        return value.detach(), pulled(kept.of[at], logits)

    def _logits(self, slot: Slot) -> Tensor:
        return slot.logits(self._split, self.backend.forward, self.backend.compute_device)

    @property
    def _split(self) -> Loss:
        if not isinstance(self._loss, Loss):
            raise UserError(NO_LOGITS)
        return self._loss

    def _share(self, index: int | None) -> float:
        """A slot's share of the total weight; 0 for an idle one and for a micro-batch whose labels are all masked."""
        return self._weights.get(index, 0.0) / self._total if index is not None else 0.0

    def _slot(self, index: int | None) -> Slot:
        microbatch = self._microbatches.get(index) if index is not None else None
        seed = block_seed(self.space.seed, "dropout", self.step, -1 if microbatch is None else microbatch.index)
        if self._chosen is not None and index is not None and microbatch is not None:
            chosen = self._chosen.get(index, Chosen(microbatch.batch, 0.0))  # not there: all of its labels are masked
            return Slot(chosen.batch, chosen.share, seed)
        return Slot(microbatch.batch if microbatch else self._stand_in, self._share(index), seed)

    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        bounds = part_bounds(self._count, part.of)[part.number]
        mine = self._slots(bounds)
        local: float | Tensor = 0.0
        nonfinite: int | Tensor = 0
        for k, index in enumerate(mine):
            self.backend.begin(last=last and k == len(mine) - 1)
            slot = self._slot(index)
            if not slot.share or index is None:
                self.backend.backward(slot.value(self._loss, self.backend.forward, self.backend.compute_device))
                continue
            with self._time.of(self._unit_samples[index]):
                value, backward = self._value(slot, index)
            local = local + _exact(value) * slot.share
            nonfinite = nonfinite + (~_exact(value).isfinite()).int()
            # The backend averages over the world; the mean over the batch is a weighted sum.
            self.backend.backward(backward * (slot.share * self.backend.world))
        return local, nonfinite

    def _value(self, slot: Slot, index: int) -> tuple[Tensor, Tensor]:
        """A micro-batch's loss, and the number whose gradient is that of the pass."""
        if self._objective is not None:
            return self._objective(slot, index)
        value = slot.value(self._loss, self.backend.forward, self.backend.compute_device)
        return value, value

    def _local_share(self, part: Part) -> float:
        return sum(self._share(index) for index in self._slots(part_bounds(self._count, part.of)[part.number]))

    @property
    def samples_per_second(self) -> float | None:
        return self._time.samples_per_second


def _exact(value: Tensor) -> Tensor:
    """A loss as a 0-d fp64 tensor, where it was computed. Raises RuntimeError for more numbers than one."""
    return value.detach().double().reshape(())
