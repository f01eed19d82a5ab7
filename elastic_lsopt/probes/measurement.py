"""How a measure is taken, wherever it is asked for: in a job, in the Trainer, of a finished model, in a study.

    measuring = Measurement(space, backend, loss)
    with measuring.at_rest():                                 eval mode, and no gradient is left behind
        oracle = measuring.oracle(microbatches, clock)        its products are checked once
        answer = measuring.take("lambda_max", {}, context)    what it says, or why it says nothing
        measuring.done_with(oracle)

A measure that cannot be taken (UserError, NonFinite) ends nothing: weights that it has left elsewhere are put right on
all ranks, which have met the same error. A kernel's own RuntimeError is not told from a dead peer's, and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.curvature.products import Mode
from elastic_lsopt.oracle.eval_mode import eval_mode
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.losses.loss import Loss, Unsplit
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.probes.catalogue import ProbeContext, as_json, measure
from elastic_lsopt.space.geometry import ParameterSpace


@dataclass(frozen=True)
class Answer:
    """What a measure gave, ready for JSON; None, with the reason, where it could not be taken."""

    told: Any
    reason: str | None
    seconds: float


class Measurement:
    """Measures of one model where it stands. All methods are collective."""

    def __init__(
        self, space: ParameterSpace, backend: GradientEngine, loss: Loss | Unsplit | Any, *, products: Mode = "auto"
    ) -> None:
        self.space, self._backend, self._loss = space, backend, loss
        self._products: Mode = products
        self._settled: dict[str, Mode] = {}
        """By purpose, how products are made since the checks of its first oracle."""

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Eval mode inside; after it the gradient is empty, whatever was measured."""
        assert self._backend.module is not None
        with eval_mode(self._backend.module):
            try:
                yield
            finally:
                self.space.end_borrowed()
                self._backend.clear_gradient()

    def oracle(
        self, microbatches: Sequence[Any], clock: SampleClock, *, purpose: str = "", products: Mode | None = None,
        checked: bool = True,
    ) -> MicroBatchOracle:  # fmt: skip
        """The loss on these micro-batches. Products are checked where `checked`, unless a purpose has had its
        checks."""
        mode = self._settled.get(purpose, products or self._products)
        return MicroBatchOracle(
            self.space, self._backend, self._loss, microbatches, clock, products=mode,
            checked=checked and purpose not in self._settled,
        )  # fmt: skip

    def take(self, name: str, settings: Mapping[str, Any], context: ProbeContext) -> Answer:
        """Ask the measure of that name."""
        return self.asked(lambda: measure(name, settings).ask(context, **settings))

    def asked(self, question: Any) -> Answer:
        """The answer to `question()`."""
        began = time.monotonic()
        try:
            return Answer(as_json(question()), None, time.monotonic() - began)
        except (UserError, NonFinite) as error:  # decided by sums over all ranks, so all ranks are here
            if not self.space.in_sync:
                self.space.resync()
            return Answer(None, str(error), time.monotonic() - began)

    def done_with(self, oracle: MicroBatchOracle, purpose: str = "") -> None:
        """Free what its products hold; keep what their checks have settled."""
        if oracle.made_products:
            self._settled[purpose] = oracle.mode
        oracle.close_products()
