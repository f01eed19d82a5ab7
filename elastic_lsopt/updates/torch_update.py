"""A class of torch.optim for some of the parameters, beside an update of ours for the others.

[Note: the witness] What torch keeps per element is a Vector. What it keeps per parameter (the count of its steps, which
corrects Adam's moments) must be known on ranks that hold nothing of the parameter, and differs between parameters that
began to train at different times. So all ranks step one more number per param group and beginning, the witness, and
its counts are those of its parameters. SGD counts nothing, and makes its first momentum in another way than later ones:
`begun/<parameter>` says of which there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

ELEMENT_WISE = frozenset({
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
})  # fmt: skip
"""These very classes, no subclass of them, do on any piece of a parameter what they do on all of it."""
BEGUN = "begun"
"""A number of each parameter that SGD keeps momentum of."""


class TorchFamily:
    """A torch optimizer on this rank's pieces, as a state family: `exp_avg` is a Vector, `step/<parameter>` a number.

    `groups` are the param groups of the space's parameters, `said` the hyper-parameters of each group. The arithmetic
    is in the weights' own precision.
    """

    same_on_all_replicas = False

    def __init__(
        self, name: str, kind: type[torch.optim.Optimizer], space: ParameterSpace, groups: Sequence[int],
        said: Mapping[int, Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.name, self.space, self._kind, self._groups, self._said = name, space, kind, list(groups), said
        self.begin()

    def begin(self) -> None:
        new = {g: self._witness() for g in self._groups}
        self._witnesses = [new[g] for g in self._groups]
        """Of each parameter."""
        self._pieces: list[Tensor] = []
        self._optimizer = self._over([])

    def empty(self, key: str) -> Vector:
        return self.space.zeros()

    def step(
        self, gradient: Vector, param_groups: Sequence[Mapping[str, Any]], alone: Collection[int] = frozenset()
    ) -> None:
        """Step on the pieces, but those of the parameters `alone`, by what the groups say now; no communication."""
        self._follow()
        self._set_apart(alone)
        for own, g in zip(self._optimizer.param_groups, dict.fromkeys(self._groups), strict=True):
            own.update({k: v for k, v in param_groups[g].items() if k in own and k != "params"})
        for t, of, piece in zip(self._pieces, gradient.tensors, self.space.layout.pieces, strict=True):
            t.grad = None if piece.parameter in alone else of.to(t.dtype)
        for parameter, t in enumerate(self._witnesses):
            t.grad = None if parameter in alone else torch.zeros_like(t)
        self._optimizer.step()
        for t in [*self._pieces, *self._witnesses]:
            t.grad = None

    def state_dict(self) -> State:
        self._follow()
        names, state = [p.name for p in self.space.layout.parameters], self._optimizer.state
        out: State = {}
        for key in dict.fromkeys(key for t in self._witnesses for key, v in state[t].items() if v is not None):
            kept = [state[t].get(key) for t in self._witnesses]
            if any(isinstance(v, Tensor) and v.dim() for v in kept):
                out[key] = Vector(self.space, [state[t].get(key, torch.zeros_like(t)) for t in self._pieces])
            else:
                counts = zip(names, kept, strict=True)
                out |= {f"{key}/{name}": float(value) for name, value in counts if value is not None}
        if self._kind is torch.optim.SGD:
            begun = [any(v is not None for v in state[t].values()) for t in self._witnesses]
            out |= {f"{BEGUN}/{name}": 1.0 for name, has in zip(names, begun, strict=True) if has}
        return out

    def load_state_dict(self, state: State) -> None:
        """A parameter of which no count is given begins anew, but for SGD's of a time when it gave none."""
        self._follow()
        counts: dict[str, dict[str, float]] = {p.name: {} for p in self.space.layout.parameters}
        for path, value in state.items():
            key, _, name = path.partition("/")
            if name in counts and not isinstance(value, Vector):
                counts[name][key] = value
        vectors = {key: value for key, value in state.items() if isinstance(value, Vector)}
        told = self._kind is not torch.optim.SGD or any(key.partition("/")[0] == BEGUN for key in state)
        begun = [bool(own) or not told for own in counts.values()]
        new: dict[Any, Tensor] = {}
        self._witnesses = [
            new.setdefault((g, had, *sorted(own.items())), self._witness())
            for g, had, own in zip(self._groups, begun, counts.values(), strict=True)
        ]
        self._optimizer = self._over(self._pieces)
        kept = self._optimizer.state
        for i, (t, piece) in enumerate(zip(self._pieces, self.space.layout.pieces, strict=True)):
            if begun[piece.parameter]:
                kept[t] = {key: vector.tensors[i].to(t.dtype) for key, vector in vectors.items()}
                kept[t] |= _as_tensors([*counts.values()][piece.parameter])
        for witness, had, own in zip(self._witnesses, begun, counts.values(), strict=True):
            if had and (vectors or own):
                kept[witness] = {key: torch.zeros_like(witness) for key in vectors} | _as_tensors(own)

    def _follow(self) -> None:
        """Step on the pieces where they are now: a framework may have moved them to other storage."""
        now = self.space.weights.tensors
        if [t.data_ptr() for t in now] != [t.data_ptr() for t in self._pieces] or not self._optimizer.param_groups:
            self._remake([*zip(now, self._pieces, strict=False), *((t, t) for t in self._witnesses)], now)

    def _set_apart(self, alone: Collection[int]) -> None:
        """Parameters that do not step have a witness of their own, which begins as the one that they have left."""
        stepping = {id(t) for parameter, t in enumerate(self._witnesses) if parameter not in alone}
        apart: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter in alone:
            before = self._witnesses[parameter]
            if id(before) in stepping:
                self._witnesses[parameter] = apart.setdefault(id(before), (self._witness(), before))[0]
        if apart:
            had = self._optimizer.state
            self._remake([(t, t) for t in (*self._pieces, *self._witnesses)], self._pieces)
            for new, before in apart.values():
                kept = had.get(before, {})
                self._optimizer.state[new] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}

    def _remake(self, pairs: Sequence[tuple[Tensor, Tensor]], pieces: list[Tensor]) -> None:
        """The class anew over these pieces, with the state of the second of each pair for the first."""
        had = self._optimizer.state
        new = self._over(pieces)
        new.state.update({t: had[before] for t, before in pairs if before in had})
        self._pieces, self._optimizer = pieces, new

    def _over(self, pieces: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The class over these pieces and the witnesses, a group for each param group."""
        of = {g: list[Tensor]() for g in self._groups}
        for t, piece in zip(pieces, self.space.layout.pieces, strict=False):
            of[self._groups[piece.parameter]].append(t)
        for t, g in {id(t): (t, g) for t, g in zip(self._witnesses, self._groups, strict=True)}.values():
            of[g].append(t)
        make: Any = self._kind
        made = make([{"params": own} for own in of.values()], lr=0.0)
        for g, own in of.items():  # what a class lays down when it is made, by each group's values: Adagrad's sums
            if own:
                made.state.update(make(own, lr=0.0, **self._said[g]).state)
        return made

    def _witness(self) -> Tensor:
        return torch.zeros(1, dtype=self.space.dtype, device=self.space.shards.device)


def _as_tensors(counts: Mapping[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(float(value)) for key, value in counts.items() if key != BEGUN}
