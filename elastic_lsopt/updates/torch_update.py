"""A class of torch.optim for some of the parameters, beside an update of ours for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update import Rates

ELEMENT_WISE = frozenset({
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
})  # fmt: skip
"""These very classes, no subclass of them, do on any piece of a parameter what they do on all of it."""


class TorchFamily:
    """A torch optimizer on this rank's pieces, as a state family: what it keeps per piece is a Vector by its key.

    Raises UserError for a class that does not work element by element.
    """

    same_on_all_replicas = False

    def __init__(self, name: str, kind: type[torch.optim.Optimizer], space: ParameterSpace, options: Any) -> None:
        if kind not in ELEMENT_WISE:
            known = ", ".join(sorted(c.__name__ for c in ELEMENT_WISE))
            raise UserError(f"update {kind.__name__} may not work element by element; beside ours there are: {known}.")
        self.name, self.space, self._kind, self._options = name, space, kind, dict(options)
        self.begin()

    def begin(self) -> None:
        self._pieces: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._follow()

    def _follow(self) -> None:
        """Step on the pieces where they are now: a framework may have moved them to other storage."""
        now = self.space.weights.tensors
        if [t.data_ptr() for t in now] == [t.data_ptr() for t in self._pieces]:
            return
        had = [self._optimizer.state[t] for t in self._pieces] if self._optimizer is not None else []
        self._pieces = now
        # One param group per piece: parameters may differ in rate and decay.
        self._optimizer = self._kind([{"params": [t]} for t in now], lr=0.0, **self._options) if now else None
        for t, state in zip(now, had, strict=False):
            assert self._optimizer is not None
            self._optimizer.state[t] = state

    def empty(self, key: str) -> Vector:
        return self.space.zeros()

    def step(self, gradient: Vector, rates: Rates, hyperparameters: Mapping[str, Any]) -> None:
        """Step on the pieces; no communication."""
        self._follow()
        if self._optimizer is None:
            return
        layout = self.space.layout
        for piece, group, t, g in zip(
            layout.pieces, self._optimizer.param_groups, self._pieces, gradient.tensors, strict=True
        ):
            group.update({k: v for k, v in hyperparameters.items() if k in group and k != "params"})
            group.update(lr=rates.lr[piece.parameter], weight_decay=rates.weight_decay[piece.parameter])
            t.grad = g
        self._optimizer.step()
        for t in self._pieces:
            t.grad = None

    def state_dict(self) -> State:
        by_key: dict[str, list[Any]] = {}
        for t in self._pieces:
            for key, value in (self._optimizer.state[t] if self._optimizer is not None else {}).items():
                if value is not None:
                    by_key.setdefault(key, []).append(value)
        return {
            key: Vector(self.space, values) if values[0].dim() else float(values[0]) for key, values in by_key.items()
        }

    def load_state_dict(self, state: State) -> None:
        for i, t in enumerate(self._pieces):
            assert self._optimizer is not None
            self._optimizer.state[t] = {
                key: value.tensors[i] if isinstance(value, Vector) else torch.tensor(float(value))
                for key, value in state.items()
            }
