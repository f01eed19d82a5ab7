"""State families: whatever survives a step, by the name under which it is saved, mirrored, moved and exported.

    method          what the method remembers                 averages/ema    a mean of the weights
    update          momenta of an update rule                 trajectory      points that the run has passed

Checkpoint, mirror and reshard iterate over the families and know none by name. The key of a chunk is (family, name,
parameter, offset), and the replica where the copies of replicas may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.method import Method, State
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


class Family(Protocol):
    """As checkpoint and mirror see it."""

    @property
    def name(self) -> str: ...

    @property
    def same_on_all_replicas(self) -> bool:
        """Whether one replica's copy may stand for another's."""
        ...

    @property
    def space(self) -> ParameterSpace:
        """That its Vectors belong to: of all parameters, or of some."""
        ...

    def begin(self) -> None:
        """Begin anew from the weights as they are: a checkpoint that was loaded knows nothing of it."""
        ...

    def empty(self, key: str) -> Vector:
        """Where a saved Vector of that name can be read to, if `state_dict` does not hold one."""
        ...

    def state_dict(self) -> State:
        """Its Vectors, live (they are read and filled in place), and its numbers."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from this state, whose Vectors become its own."""
        ...


class Stateful:
    """What an author writes: how a family begins, and what it does around a step. The state is handed in each time.

    `before_step` sees the gradient that the base is about to step with (valid until it returns, before clipping),
    `after_step` the weights after the step; neither is called for a step that was skipped. Both may be collective.
    """

    name: str = ""
    same_on_all_replicas: bool = False

    @property
    def family(self) -> str:
        """The family's name: a directory of chunks in a checkpoint."""
        return self.name

    def init(self, space: ParameterSpace) -> State:
        """What it remembers before the first step."""
        return {}

    def pulled(self, space: ParameterSpace, gradient: Vector, state: State) -> Vector:
        """The gradient to step with in place of the method's, which may be another's: give one back, change none."""
        return gradient

    def before_step(self, space: ParameterSpace, gradient: Vector, samples: int, state: State) -> None:
        """Called with the gradient of a step on `samples` samples."""

    def move(self, space: ParameterSpace, state: State) -> None:
        """Called just before the base steps: may move `space.weights` itself, in place."""

    def after_step(self, space: ParameterSpace, report: StepReport, state: State) -> None:
        """Called when the base has stepped."""


class Kept:
    """A `Stateful` with its state on one space: a `Family`."""

    def __init__(self, kind: Stateful, space: ParameterSpace) -> None:
        self.kind, self.space = kind, space
        self.state: State = {}
        self.begin()

    @property
    def name(self) -> str:
        return self.kind.family

    @property
    def same_on_all_replicas(self) -> bool:
        return self.kind.same_on_all_replicas

    def begin(self) -> None:
        began: object = self.kind.init(self.space)
        if not isinstance(began, dict):
            raise UserError(
                f"{type(self.kind).__name__}.init returned a {type(began).__name__}; it must return a dict of Vectors "
                "and numbers."
            )
        self.state.clear()
        self.state.update(began)

    def empty(self, key: str) -> Vector:
        return self.space.zeros()

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        self.state.update(state)


@dataclass(frozen=True)
class MethodFamily(Stateful):
    """The method's own state, as a family."""

    method: Method
    name: str = "method"
    same_on_all_replicas: bool = False

    def init(self, space: ParameterSpace) -> State:
        return self.method.init(space)
