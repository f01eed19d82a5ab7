"""Micro-batches of a user's own loop whose gradients one step adds up.

    for batch in loader:
        @optimizer.accumulate
        def closure(): …; (loss / 4).backward(); return loss / 4
        …                                   # loops of several kinds: accelerate's `accumulate`, or by hand
        optimizer.step(closure)             # with the fourth one: every pass runs all four

A gradient that is in the parameters when a step begins cannot be taken again at perturbed weights. So it is refused,
unless it is the step's own of last time, or there are closures that make it again.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.closure_oracle import Closure


class Accumulation:
    """The closures that were handed in since the last step, and what that step left in the parameters."""

    def __init__(self) -> None:
        self._closures: list[Closure] = []
        self._left: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def add(self, closure: Closure) -> None:
        self._closures.append(closure)

    def take(self, given: Closure | Sequence[Closure]) -> list[Closure] | None:
        """The closures of this step in their order, or None where `given` is all there is.

        `given` stands for the last one; it may be wrapped. Raises UserError where it does not hold it, or where
        accelerate has dropped closures.
        """
        waiting, self._closures = self._closures, []
        if not waiting:
            _refuse_dropped()
            return None
        if not callable(given) or not _holds(given, waiting[-1]):
            raise UserError(
                f"step() got another closure than the last of the {len(waiting)} handed to accumulate(): hand every "
                "micro-batch's closure to optimizer.accumulate(closure), the last one too, and step with that."
            )
        return [*waiting[:-1], given]

    def refuse_foreign(self, backend: Backend) -> None:
        """Raise UserError where a backward pass outside of step() has left a gradient. Waits for a GPU only then."""
        for key in backend.slot_keys:
            if key.grad is not None and not self._is_left(key) and bool(local(key.grad).any()):
                break
        else:
            if not any(bool(g.any()) for g in backend.unreduced_gradients()):
                return
        raise UserError(
            "a backward pass outside of step() has left a gradient, which cannot be taken again at perturbed weights: "
            "to accumulate micro-batches, hand each one's closure to optimizer.accumulate(closure), or run them all in "
            "one closure; to drop it, call optimizer.zero_grad() before step()."
        )

    def note_left(self, backend: Backend) -> None:
        """After a step: the gradients that are there now are its own."""
        self._left = {
            id(key): (weakref.ref(local(key.grad)), local(key.grad)._version)
            for key in backend.slot_keys
            if key.grad is not None
        }

    def _is_left(self, key: Tensor) -> bool:
        reference, version = self._left.get(id(key), (None, -1))
        mine = local(key.grad) if key.grad is not None else None
        return reference is not None and mine is not None and reference() is mine and mine._version == version


def _holds(given: Any, closure: Callable[..., Any]) -> bool:
    """Whether a closure is another one, or wraps it as Lightning does, by `functools.partial`."""
    if given is closure:
        return True
    return isinstance(given, partial) and any(_holds(part, closure) for part in (given.func, *given.args))


def accelerate_goes_on() -> bool:
    """Whether accelerate's `accumulate` has told its optimizers that this is not the last micro-batch of an update."""
    state = sys.modules.get("accelerate.state")
    return state is not None and not state.GradientState().sync_gradients


def _refuse_dropped() -> None:
    """With accelerate only the step of the last micro-batch is one: the others' closures never run."""
    state = sys.modules.get("accelerate.state")
    steps = state.GradientState().num_steps if state is not None else 1
    if steps > 1:
        raise UserError(
            f"accelerate accumulates {steps} micro-batches and passes on the closure of the last one alone: hand every "
            "micro-batch's closure to optimizer.accumulate(closure), or set gradient_accumulation_steps=1 and run them "
            "all in one closure."
        )
