"""Which copies of the weights are right: the working copy that a move edits, and the gathered ones that forwards read.

A move, a return, a step and a resync each rewrite copies. What reads them asks here first: `refuse_stale` where a copy
may be wrong, `ready` where one is only not made yet. Nothing here knows a norm, a direction or an algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastic_lsopt.errors import StaleGeneration, StaleWeights
from elastic_lsopt.space.layout import Shards


class WeightCopies:
    """The state of one model's copies on this rank. `resync` is collective; so is `ready` after a deferred return."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.perturbations = 0
        """How deep the weights are inside `perturbed` blocks: 0 at rest."""
        self.edits = 0
        """Steps and resyncs so far: fused optimizers write where autograd does not count."""
        self._generation_over = False
        self._stale: str | None = None
        self._unrefreshed = False
        self._deferring = False

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside, the end of a perturbation refreshes nothing: the step that follows rewrites all copies anyway.

        The oracle refreshes before the next forward, if there is one; `resync` does in every case.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def rewritten(self) -> None:
        """Weights were written in place, by whatever way: each move, return, step and resync ends here.

        Autocast casts a weight once and keeps the cast until its outermost context ends: inside one, the next forward
        would compute with the weights as they were.
        """
        torch.clear_autocast_cache()

    def returned(self) -> None:
        """A perturbation has restored this rank's part: make the other copies right now, or before the next forward."""
        if self._deferring:
            self._unrefreshed = True
        else:
            self._shards.refresh_gathered()

    def stepped(self) -> None:
        """The base optimizer has rewritten every copy of the weights."""
        self._unrefreshed = False
        self.edits += 1
        self.rewritten()

    def refresh(self) -> None:
        """The masters were moved in place when the base had stepped: make the other copies equal to them (collective;
        where weights are gathered, one gather of them)."""
        self._shards.drop_gathered()
        if self._shards.separate_master and self._shards.masters:
            torch._foreach_copy_(list(self._shards.working), list(self._shards.masters))
        self._shards.refresh_gathered()
        self.rewritten()

    def ready(self) -> None:
        """Before a forward (collective): raise StaleWeights after an exception, refresh what was deferred."""
        self.check_generation()
        self.refuse_stale("a forward pass")
        if self._unrefreshed:
            self._shards.refresh_gathered()
            self._unrefreshed = False

    @property
    def in_sync(self) -> bool:
        """Whether all copies of the weights are right."""
        return self._stale is None and not self._unrefreshed

    def mark_stale(self, reason: str) -> None:
        """Refuse forward passes, saves and perturbations until `resync()`."""
        self._stale = reason

    def refuse_stale(self, what: str) -> None:
        if self._stale is not None:
            raise StaleWeights(
                f"{what} is refused: gathered copies of the weights may be wrong after {self._stale}; "
                "call space.resync() on all ranks first."
            )

    def resync(self) -> None:
        """Make all copies of the weights right again after an exception (collective; one gather of the weights)."""
        self.check_generation()
        self._shards.repair()
        self._shards.drop_gathered()
        self._shards.refresh_gathered()
        self._stale, self._unrefreshed = None, False
        self.edits += 1
        self.rewritten()

    def retire(self) -> None:
        """End this generation: every later use of the space or of its vectors raises StaleGeneration."""
        self._generation_over = True

    def check_generation(self) -> None:
        if self._generation_over:
            raise StaleGeneration(
                "this parameter space belongs to an older generation of the model or its workers; "
                "take space and vectors from the engine again."
            )
