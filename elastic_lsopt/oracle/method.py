"""What a method is, and all that an algorithm remembers from step to step."""

from __future__ import annotations

from typing import Protocol

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

State = dict[str, Vector | float | int]
"""Named Vectors and numbers: saved, mirrored and resharded by name; a method's keys that begin with _ end with the
step."""


class Method(Protocol):
    """What gradient to step with; a frozen keyword-only dataclass whose fields are the hyper-parameters."""

    @property
    def parts(self) -> int:
        """Into how many parts the global batch is cut (1: each pass sees all of it at one point)."""
        ...

    # A method may also have, and is then asked for:
    #   needs                             what the base must keep: a set of `Need`s (oracle/base.py)
    #   needs_logits                      whether the loss must be an lso.Loss
    #   halves                            whether its two gradients are taken at once (oracle/halves_oracle.py)
    #   passes_at(step) -> int            passes that the step begins, where they are not one
    #   move(space, gradient, base, clock, state)     just before the base steps: move `space.weights` itself, in place
    #   decouple                          whether it has anything to `move`, where that is for its settings to say
    #   settle(space, state) -> bool      when the base has stepped (not where the step was left out): move
    #                                     `space.weights`, in place; whether it did, alike on all ranks
    #   point(space, weights) -> Vector   the model's own weights, of these or of an average of them: where it is
    #                                     evaluated and exported; a Vector of its own

    def init(self, space: ParameterSpace) -> State:
        """What the method remembers before its first step."""
        ...

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        """The vector that the base steps with; may update `state` in place. The weights are back on return."""
        ...
