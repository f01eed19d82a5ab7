"""The oracle of an engine that owns the passes: whole units of work, exact weights, the same dropout in every pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.checks import check_products
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.differences import Product
from elastic_lsopt.oracle.loss import Loss, refuse_coupled_samples, samples
from elastic_lsopt.oracle.oracle import Oracle, Part
from elastic_lsopt.oracle.passes import Passes
from elastic_lsopt.oracle.products import Mode, Products, refuse_unknown
from elastic_lsopt.oracle.slot import Slot
from elastic_lsopt.oracle.units import Unit, as_units, part_bounds, slots
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.noise import block_seed
from elastic_lsopt.space.vector import Lease, Vector


class UnitsOracle(Oracle):
    """The mean loss over this step's units, given whole to ranks; see `oracle/units.py`.

    Each unit is weighed by its count of samples or unmasked tokens. Its dropout depends on (seed, step, index), so a
    second pass, another rank and another world size see the same masks. `samples` counts the global batch. Making one
    costs one all-reduce of 5 + world numbers. Raises UserError where a rank has no micro-batch, or another's.
    """

    def __init__(
        self,
        space: ParameterSpace,
        backend: Passes,
        loss: Loss | Any,
        microbatches: Sequence[Any],
        clock: SampleClock,
        *,
        stop_requested: Callable[[], bool] | None = None,
        signals: Callable[[], Sequence[float]] | None = None,
        products: Mode = "auto",
        checked: bool = False,
    ) -> None:
        super().__init__(space, backend, clock, stop_requested=stop_requested, signals=signals)
        refuse_unknown(products)
        if backend.module is not None:
            refuse_coupled_samples(backend.module)
        self._loss = loss
        units = as_units(microbatches, backend.rank, backend.world)
        self._units = {u.index: u for u in units if not u.idle}
        self._stand_in = units[0].batch if units else None
        self._weights = {i: float(loss.count(u.batch)) for i, u in self._units.items()}
        self._unit_samples = {i: samples(u.batch) for i, u in self._units.items()}
        self._agree(units)
        self._mode: Mode = products
        self._checked = checked
        self._curvature: Products | None = None

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
                    self.space.end_lease()
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

    def _outliving(self, v: Vector) -> Vector:
        """A gradient that is only lent would end with the checks' own passes."""
        return v.clone() if isinstance(v, Lease) and self._checked and self._curvature is None else v

    def _agree(self, units: Sequence[Unit]) -> None:
        """All ranks learn the total weight, the number of units, and whether a rank has nothing to run."""
        world, rank = self.backend.world, self.backend.rank
        given = [u.index for u in units if not u.idle]
        own = [
            sum(self._weights.values()),
            sum(self._unit_samples.values()),
            not units,
            any(u < 0 or u % world != rank for u in given),
            len(given) - len(self._units),
            *(max(self._units, default=-1) + 1 if r == rank else 0 for r in range(world)),
        ]
        values = torch.tensor(own, dtype=torch.float64, device=self.backend.device)
        total, number, empty, misplaced, twice, *ends = self.backend.sum_world_(values).tolist()
        self._count, self._evenly = int(max(ends)), not misplaced
        if misplaced and not self._each_once():
            raise UserError(
                f"{int(misplaced)} rank(s) got a unit that is another's: unit u belongs to rank u mod {world}."
            )
        if twice:
            raise UserError(f"{int(twice)} unit(s) share the index of another; every unit needs an index of its own.")
        if empty:
            raise UserError(
                f"{int(empty)} of {world} ranks got no micro-batch; give every rank at least one (or Unit(idle=True))."
            )
        if not total > 0:
            raise UserError(
                f"the total weight of the global batch is {total}; it must be > 0 (are all labels masked?)."
            )
        self._total, self.samples = total, int(number)
        self._forward_s, self._forward_samples = 0.0, 0

    def _each_once(self) -> bool:
        """Whether the ranks hold each unit once in shares of their own, as a plan for unequal ranks deals them.

        Only where every rank holds all weights: there no forward waits for another rank. One all-reduce of a number a
        unit.
        """
        if self.backend.replicas < self.backend.world:
            return False
        held = torch.zeros(self._count + 1, dtype=torch.float64, device=self.backend.device)
        for index in self._units:
            held[index if index >= 0 else self._count] += 1
        *units, below = self.backend.sum_world_(held).tolist()
        return not below and all(ranks == 1 for ranks in units)

    def _slots(self, bounds: tuple[int, int]) -> list[int | None]:
        """This rank's forwards for one part; None is an idle slot."""
        if self._evenly:
            return slots(bounds, self.backend.rank, self.backend.world)
        first, end = bounds
        # At least one: the backward that closes a pass is each rank's.
        return [*sorted(u for u in self._units if first <= u < end)] or [None]

    @property
    def weight(self) -> float:
        """The total weight of the global batch: its samples or unmasked tokens."""
        return self._total

    def parts(self, m: int) -> list[Part]:
        return [
            Part(self, i, m, (end - first) / self._count) for i, (first, end) in enumerate(part_bounds(self._count, m))
        ]

    def loss(self) -> float:
        self.space.ready()
        local = 0.0
        with torch.no_grad():
            for index in self._slots((0, self._count)):
                slot = self._slot(index)
                value = slot.value(self._loss, self.backend.forward, self.backend.device)
                if slot.share:
                    local += value.item() * slot.share
        return self.backend.sum_world_(torch.tensor([local], dtype=torch.float64, device=self.backend.device)).item()

    def mean_over_logits(self, function: Callable[[Tensor, Any], Tensor]) -> float:
        """The mean of `function(logits, batch)`, a mean over a unit, weighed as the loss is (collective; one forward).

        Raises UserError for a loss that is not split: then nobody knows what the logits are.
        """
        if not isinstance(self._loss, Loss):
            raise UserError(
                "the logits need the loss in two steps; pass lso.Loss(forward, criterion, count) as loss_fn."
            )
        self.space.ready()
        local = 0.0
        with torch.no_grad():
            for index in self._slots((0, self._count)):
                slot = self._slot(index)
                logits = slot.logits(self._loss, self.backend.forward, self.backend.device)
                if slot.share:
                    local += function(logits, slot.batch).item() * slot.share
        return self.backend.sum_world_(torch.tensor([local], dtype=torch.float64, device=self.backend.device)).item()

    def _share(self, index: int | None) -> float:
        """A slot's share of the total weight; 0 for an idle one and for a unit whose labels are all masked."""
        return self._weights.get(index, 0.0) / self._total if index is not None else 0.0

    def _slot(self, index: int | None) -> Slot:
        unit = self._units.get(index) if index is not None else None
        seed = block_seed(self.space.seed, "dropout", self.step, -1 if unit is None else unit.index)
        return Slot(unit.batch if unit else self._stand_in, self._share(index), seed)

    def _backward(self, part: Part, *, last: bool) -> tuple[float, int]:
        bounds = part_bounds(self._count, part.of)[part.number]
        mine = self._slots(bounds)
        local, nonfinite = 0.0, 0
        for k, index in enumerate(mine):
            self.backend.begin(last=last and k == len(mine) - 1)
            slot, start = self._slot(index), time.monotonic()
            share, value = slot.share, slot.value(self._loss, self.backend.forward, self.backend.device)
            if share and index is not None:
                local += value.item() * share  # on a GPU this waits for the forward to end
                nonfinite += not math.isfinite(value.item())
                self._forward_s += time.monotonic() - start
                self._forward_samples += self._unit_samples[index]
                # The backend averages over the world; the mean over the batch is a weighted sum.
                value = value * (share * self.backend.world)
            self.backend.backward(value)
        if self._forward_s:
            self.samples_per_second = self._forward_samples / self._forward_s
        return local, nonfinite
