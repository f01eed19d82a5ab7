"""The loss on this step's global batch, as something one can ask at the point where the weights are now.

    oracle.gradient()                            one pass: borrowed from the engine's gradient buffer
    with oracle.accumulating() as total:         one pass whose parts may stand at different points
        for part in oracle.parts(m): part.backward()
    total.gradient
    oracle.gradient(part)                        a pass over one part alone: the gradient of its own mean loss

Every pass ends in one all-reduce of seven numbers, (loss, sum of squares of the gradient, non-finite losses, stop
requests, checksum of the used parameters, its square, share of the batch), and of the runtime's `Piggyback`, on which
all ranks decide alike. There the host waits for the device, once per pass: until then losses stay where they were
computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.base import Base
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.curvature.compute_type import observed
from elastic_lsopt.oracle.curvature.differences import Product
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.observation import HowProducts, Observation, observe
from elastic_lsopt.oracle.replay.buffers import still_buffers
from elastic_lsopt.oracle.split.logits import NO_LOGITS, OutputGradients
from elastic_lsopt.oracle.split.sample_losses import SampleLosses
from elastic_lsopt.oracle.step_report import Piggyback
from elastic_lsopt.space.geometry import ParameterSpace, local_square
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.space.vector import BorrowedGradient, Vector

EXACT = 2**26
"""Sums over the ranks below this have a square that fp64 holds exactly."""

NO_HALVES = (
    "halves of the ranks are formed by lso.Engine and `elastic-lsopt train`, which deal each micro-batch to both; use "
    "one of these, or set halves=False."
)


@dataclass
class Pass:
    """One gradient in the making: `loss` and `gradient` are set when the block of `accumulating()` ends."""

    parts: int = 0
    done: int = 0
    local_loss: float | Tensor = 0.0
    nonfinite: int | Tensor = 0
    loss: float = math.nan
    share: float = 1.0
    """Of the batch's total weight that it has seen: less than 1 for a part alone."""
    _gradient: BorrowedGradient | None = None

    @property
    def gradient(self) -> BorrowedGradient:
        if self._gradient is None:
            raise RuntimeError("the gradient is there when the block of oracle.accumulating() has ended.")
        return self._gradient


@dataclass(frozen=True)
class Part:
    """A share of the global batch, cut by sample index; `weight` is about its share of the batch's total weight, as if
    all micro-batches weighed the same."""

    oracle: Oracle
    number: int
    of: int
    weight: float

    def backward(self) -> None:
        """Add this part's share of the gradient at the present weights to the engine's buffer (collective)."""
        self.oracle._run(self)


class Oracle(ABC):
    """The global batch of one step as a function of the weights. All methods are collective.

    `losses` holds the mean loss of each pass so far, `passes` their number, `piggyback` the sums over all ranks of what
    the elastic runtime gave at the last pass (None: nothing).
    """

    def __init__(
        self,
        space: ParameterSpace,
        backend: GradientEngine,
        clock: SampleClock,
        *,
        stop_requested: Callable[[], bool] | None = None,
        piggyback: Callable[[], Piggyback] | None = None,
    ) -> None:
        self.space, self.backend, self.clock = space, backend, clock
        self.losses: list[float] = []
        self.base: Base | None = None
        """What a method may know of the base that steps with its gradient; None outside of a step."""
        self._first: dict[int | None, tuple[float, float]] = {}
        """By part (None: all of them): the share of the batch and the loss of its first pass."""
        self._swept = 0.0
        self._unused: frozenset[int] | None = None
        """Slots that no pass so far has given a gradient; None before any pass."""
        self.begun = 0
        """Passes that were begun, those over a part among them."""
        self.moves_buffers = False
        """Whether the first pass may move buffers (batch norm's statistics): it does in a step, and not in a probe."""
        self.observations: Sequence[Observation] = ()
        """What updates look at in this step; see `observation.py`."""
        self.observed = 0
        """Gradients of the global batch that were taken for them."""
        self.stop = False
        self.piggyback: Piggyback | None = None
        self._stop_requested, self._own_piggyback = stop_requested, piggyback
        self._running: Pass | None = None
        self._alone: Part | None = None

    @property
    def step(self) -> int:
        """The number of this optimizer step: the same at any world size."""
        return self.clock.steps

    @property
    def passes(self) -> float:
        """Gradients of the global batch that were taken; one of a part alone counts as the part's share."""
        swept = round(self._swept, 6)
        return int(swept) if swept.is_integer() else swept

    @property
    def first_loss(self) -> float:
        """The mean loss of the first pass over the global batch, or of what was seen of it; nan before any."""
        first = [self._first[None]] if None in self._first else list(self._first.values())
        return sum(s * loss for s, loss in first) / sum(s for s, _ in first) if first else math.nan

    @property
    def samples_per_second(self) -> float | None:
        """Of this rank's own forwards in gradient passes, where the oracle runs them itself; None before the first."""
        return None

    @abstractmethod
    def parts(self, m: int) -> Sequence[Part]:
        """The global batch as m parts of about equal size. Raises UserError where it has fewer micro-batches than
        parts."""

    @abstractmethod
    def loss(self) -> float:
        """The mean loss of the global batch at the present weights: one forward of every micro-batch, no gradient."""

    @abstractmethod
    def _local_share(self, part: Part) -> float:
        """What this rank runs of the part, as a share of the batch's total weight."""

    @abstractmethod
    def _backward(self, part: Part, *, last: bool) -> tuple[float | Tensor, int | Tensor]:
        """Run the part; return this rank's share of the mean loss and its count of non-finite losses.

        0-d tensors on the device where that is where they are: reading one here would wait for the forward.
        """

    def gradient(self, part: Part | None = None) -> BorrowedGradient:
        """The gradient of the mean loss at the present weights: one pass, no memory (borrowed).

        Of all the batch; or of one part of it, whose share of the batch is then in `shares`, at the part's share of a
        pass. Raises NonFinite on all ranks alike where any loss or gradient is inf or NaN.
        """
        with self._accumulating(part) as total:
            for each in self.parts(1) if part is None else (part,):
                each.backward()
        return total.gradient

    @property
    def shares(self) -> dict[int, float]:
        """The exact share of the batch's total weight of each part whose gradient was taken alone, by its number."""
        return {number: share for number, (share, _) in self._first.items() if number is not None}

    def gradient_and_pull(self) -> tuple[BorrowedGradient, OutputGradients]:
        """`gradient`, and the gradients of the loss by the logits, which `pullback` takes elsewhere (collective).

        Memory: the logits of this rank's micro-batches. Raises UserError where the loss is not an lso.Loss.
        """
        raise UserError(NO_LOGITS)

    def pullback(self, by_outputs: OutputGradients) -> BorrowedGradient:
        """J' u: the Jacobian of the logits at the present weights, transposed, times the gradients u (one pass)."""
        raise UserError(NO_LOGITS)

    def gradient_and_sample_losses(self) -> tuple[BorrowedGradient, SampleLosses]:
        """`gradient`, and each sample's own loss (collective). Raises UserError where the loss is not an lso.Loss."""
        raise UserError(NO_LOGITS)

    def sample_losses(self) -> SampleLosses:
        """Each sample's own loss at the present weights: one forward of every micro-batch (collective)."""
        raise UserError(NO_LOGITS)

    def gradient_of_risen(self, before: SampleLosses, after: SampleLosses, gamma: float) -> BorrowedGradient:
        """The gradient of the mean loss of the share `gamma` of the samples whose losses have risen most (collective).

        A pass over these samples alone.
        """
        raise UserError(NO_LOGITS)

    @property
    def half(self) -> int:
        """In which half of the ranks this one is, 0 or 1. Raises UserError where there are no halves."""
        raise UserError(NO_HALVES)

    def gradients_of_halves(self) -> tuple[Vector, BorrowedGradient]:
        """The gradient where the first half of the ranks stands, and that where the second does: one pass by the clock.

        Both on every rank (collective). Raises UserError where there are no halves.
        """
        raise UserError(NO_HALVES)

    def hvp(self, v: Vector) -> Product:
        """The Hessian of the mean loss at the present weights, times v: sharded as v is (collective).

        Exact, or with an error estimate: see `products.py` for modes, cost and memory. Raises UserError for an oracle
        made of closures.
        """
        raise UserError(
            "products with the curvature need more than a closure; use lso.attach(model, loss_fn, batches)."
        )

    def ggn_vp(self, v: Vector) -> Product:
        """The generalised Gauss-Newton matrix of the mean loss at the present weights, times v (collective).

        Raises UserError where the loss is not an lso.Loss, which says what the logits are.
        """
        return self.hvp(v)

    @property
    def weight(self) -> float:
        """The total weight of the global batch: its samples or unmasked tokens."""
        raise UserError("a closure does not say how much its batch weighs; use lso.attach(model, loss_fn, batches).")

    def sampled_gradient(self) -> BorrowedGradient:
        """The gradient for labels that are drawn from the model (one pass, no memory).

        Raises UserError where the loss does not say how to draw them.
        """
        raise UserError("labels cannot be drawn for a closure; use lso.attach(model, loss_fn, batches).")

    def hessian_diagonal(self, how: HowProducts) -> Vector:
        """z * H z at the present weights, z of this step; an own vector."""
        raise UserError(
            "products with the curvature need more than a closure; use lso.attach(model, loss_fn, batches)."
        )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes inside are none of the method's: they count nowhere, and move no buffers."""
        kept = self.losses, self.moves_buffers, self._first, self._swept, self.begun, self._unused
        self.losses, self.moves_buffers, self._first = [], False, {}
        try:
            yield
        finally:
            self.losses, self.moves_buffers, self._first, self._swept, self.begun, self._unused = kept

    def accumulating(self) -> AbstractContextManager[Pass]:
        """One pass made of parts, each run once and in order, wherever the weights are meanwhile."""
        return self._accumulating(None)

    @contextmanager
    def _accumulating(self, alone: Part | None) -> Iterator[Pass]:
        if self.observations:
            observe(self)
        self.begun += 1
        self.space.check_generation()
        self.space.end_borrowed()
        self.backend.clear_gradient()
        self._running = total = Pass()
        if alone is not None:
            total.done, total.parts = alone.number, alone.of
        # The first pass over a sample is at the weights themselves; no other may move running statistics.
        moving = self.moves_buffers and not self._seen(alone)
        self._alone = alone
        try:
            with nullcontext() if moving else still_buffers(self.backend.roots):
                yield total
        finally:
            self._running = None
        end = total.parts if alone is None else alone.number + 1
        if total.done != end or not total.parts:
            raise RuntimeError(f"{total.done} of {total.parts} parts ran backward(); run each once, in order.")
        self._close(total, alone)
        without = self.backend.without_gradient()
        self._unused = without if self._unused is None else self._unused & without

    def _seen(self, alone: Part | None) -> bool:
        """Whether a pass has been over samples of this part (None: of the batch) before."""
        return None in self._first or (bool(self._first) if alone is None else alone.number in self._first)

    def install(self, vector: Vector) -> Vector:
        """Make `vector` the gradient that the engine steps with, and return that (nothing to do for a pass's own).

        It is 0 in the parameters that no pass of this step has used, which method and base leave as they are.
        """
        unused = self._unused or ()
        if isinstance(vector, BorrowedGradient) and vector.valid:
            # Where the last pass gave no gradient, what was written into it is nowhere in the engine's buffer.
            if vector.known_norm is None and self.backend.without_gradient():
                for piece, t in zip(self.space.layout.pieces, vector.tensors, strict=True):
                    if piece.slot in unused:
                        t.zero_()
                self.backend.install(vector)
            return vector
        if unused:  # `vector` may be what the method keeps
            pieces = zip(self.space.layout.pieces, vector.tensors, strict=True)
            vector = Vector(self.space, [torch.zeros_like(t) if p.slot in unused else t for p, t in pieces])
        self.space.end_borrowed()
        self.backend.install(vector)
        return vector

    def _run(self, part: Part) -> None:
        total = self._running
        if total is None:
            raise RuntimeError("part.backward() runs inside `with oracle.accumulating():`.")
        if part.number != total.done or total.parts not in (0, part.of):
            raise RuntimeError(
                f"part {part.number} of {part.of} ran where part {total.done} was due; run each once, in order."
            )
        total.parts = part.of
        self.space.copies.ready()
        with observed(self.backend):
            loss, nonfinite = self._backward(part, last=self._alone is not None or part.number == part.of - 1)
        total.local_loss += loss
        total.nonfinite += nonfinite
        total.done += 1

    def _close(self, total: Pass, alone: Part | None) -> None:
        gradients = self.backend.gradients()
        square = local_square(gradients) / self.backend.holders
        asked = self._stop_requested is not None and self._stop_requested()
        used = self.backend.used() % (EXACT // self.backend.world)
        share = 0.0 if alone is None else self._local_share(alone)
        own = [total.local_loss, square, total.nonfinite, asked, used, used**2, share]
        riding = self._own_piggyback().numbers if self._own_piggyback is not None else []
        values = on_device([*own, *riding], self.backend.compute_device)
        loss, square, nonfinite, stop, used, squares, share, *rode = self.backend.sum_replica_(values).tolist()
        if alone is not None:
            total.share, whole = share, share or 1.0  # a part whose labels are all masked weighs nothing
            loss, square = loss / whole, square / whole**2
        self._first.setdefault(None if alone is None else alone.number, (total.share, loss))
        self._swept += total.share
        self.losses.append(loss)
        self.stop = self.stop or stop > 0
        self.piggyback = Piggyback.of(rode) if rode else None
        if self.backend.world * squares != used**2:  # all alike, and only then, by Cauchy and Schwarz
            raise UserError(
                f"step {self.step}, pass {self.passes}: the ranks used different parameters in the same micro-batch, "
                "or in another order, where FSDP2 and ZeRO add the gradient of one to that of another; let each use "
                "all in one order (add 0 * output.sum() of what it leaves out), or train with DDP or ZeRO stage 0."
            )
        if nonfinite or not math.isfinite(loss) or not math.isfinite(square):
            raise NonFinite(
                f"step {self.step}, pass {self.passes}: loss {loss}, gradient norm {math.sqrt(abs(square))}"
            )
        if alone is not None:
            torch._foreach_mul_(list(gradients), 1 / (share or 1.0))
        total.loss = loss
        total._gradient = self.space.lend(gradients, math.sqrt(square))
