"""What a method is told of the base optimizer: its momenta and rates, whichever class it is and wherever it keeps them.

momentum        SGD's momentum_buffer, Adam's exp_avg, an update's `first_moment`
second moment   Adam's exp_avg_sq / (1 - b2^t), RMSprop's square_avg, Adagrad's sum, an update's `second_moment`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.base import Need
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.group_rules import is_torch
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer, updates_of

FIRST = ("momentum_buffer", "exp_avg")
"""Under which torch keeps a mean of gradients."""
SECOND = ("exp_avg_sq", "square_avg", "sum")
"""Under which torch keeps a mean, or the sum, of their squares."""
FIX = {
    "momentum": "give one that has (SGD with momentum > 0, AdamW, LARS, Muon)",
    "second_moment": "give one that has (AdamW, Adam, RMSprop, LAMB)",
    "sgd": "give torch.optim.SGD",
}
WORDS = {"momentum": "a base that keeps momentum", "second_moment": "a base that keeps second moments", "sgd": "SGD"}


class BaseView:
    """The base of a backend as a `Base`; see there. Raises UserError from `refuse` where it lacks what is needed."""

    def __init__(self, backend: Backend, space: ParameterSpace) -> None:
        self._backend, self._space = backend, space
        self._update = updates_of(backend.base)

    def refuse(self, name: str, needs: frozenset[Need]) -> None:
        """Raise UserError where the base has not what the method of that name needs."""
        for need in sorted(needs):
            for group in self._backend.param_groups:
                if not self._has(need, group):
                    kind = group["update"] if self._update is not None else type(self._backend.base).__name__
                    without = " without momentum" if need == "momentum" and "momentum" in group else ""
                    raise UserError(f"{name} needs {WORDS[need]}, and the base is {kind}{without}; {FIX[need]}.")

    def _has(self, need: Need, group: Mapping[str, Any]) -> bool:
        rule = self._update.rule_of(group) if self._update is not None else type(self._backend.base)
        if not is_torch(rule):
            key = {"momentum": "first_moment", "second_moment": "second_moment"}.get(need, "")
            return bool(getattr(rule, key, ""))
        adams = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
        match need:
            case "momentum":
                return issubclass(rule, (*adams, torch.optim.Adamax)) or group.get("momentum", 0) > 0
            case "second_moment":
                return issubclass(rule, (*adams, torch.optim.RMSprop, torch.optim.Adagrad))
            case _:
                return rule is torch.optim.SGD

    def momentum(self) -> Vector:
        return Vector(self._space, [m if m is not None else torch.zeros_like(w) for w, m, _ in self._kept(FIRST)])

    def second_moment(self) -> Vector:
        out = self._space.zeros()
        for t, (_, kept, correction) in zip(out.tensors, self._kept(SECOND), strict=True):
            if kept is not None:
                t.copy_(kept).div_(correction or 1.0)
        return out

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def sgd_step(self, gradient: Vector) -> Vector:
        out = gradient.clone()
        rows = zip(out.tensors, self._kept(FIRST), self._groups(), strict=True)
        for d, (w, buffer, _), group in rows:
            d.add_(w, alpha=group["weight_decay"])
            if mu := group["momentum"]:
                v = d if buffer is None else buffer.to(d.dtype) * mu + d * (1 - group["dampening"])
                d.copy_(d + mu * v if group["nesterov"] else v)
            d.mul_(float(group["lr"]))
        return out

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """The param group of each of this rank's pieces."""
        for piece in self._space.layout.pieces:
            name = self._space.layout.parameters[piece.parameter].name
            if self._update is not None:
                yield self._update.group_of(self._backend.parameters[name])
            else:
                yield self._backend.group_of(piece)

    def _kept(self, names: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor | None, float]]:
        """Each piece's weights, what the base keeps of it under the first of these names, and 1 - b2^t (1: none)."""
        weights = self._space.weights.tensors
        if self._update is not None:
            yield from zip(weights, *self._of_updates(self._update, names), strict=True)
            return
        for w, piece, group in zip(weights, self._space.layout.pieces, self._groups(), strict=True):
            state, _ = self._backend.state_of(piece)
            name = next((n for n in names if isinstance(state.get(n), Tensor)), None)
            if name is None:
                yield w, None, 1.0
                continue
            kept = local(state[name]).view(-1)[piece.start : piece.start + piece.length]
            yield w, kept, correction(name, float(state.get("step", 0)), group)

    def _of_updates(self, base: UpdateOptimizer, names: tuple[str, ...]) -> tuple[list[Tensor | None], list[float]]:
        kept: list[Tensor | None] = [None] * len(self._space.layout.pieces)
        debias = [1.0] * len(kept)
        for bound in base.bound:
            space, state = bound.family.space, bound.family.state_dict()
            rule = base.rule_of(base.param_groups[bound.groups[0]])
            own = "second_moment" if names is SECOND else "first_moment"
            known = names if is_torch(rule) else (getattr(rule, own),)
            key = next((k for k in known if isinstance(state.get(k), Vector)), None)
            if key is None:
                continue
            places = getattr(space.shards, "places", range(len(kept)))
            vector: Any = state[key]
            for place, piece, t in zip(places, space.layout.pieces, vector.tensors, strict=True):
                group = base.param_groups[bound.groups[piece.parameter]]
                parameter = space.layout.parameters[piece.parameter].name
                steps: Any = state.get(f"step/{parameter}", state.get("step", 0))
                kept[place], debias[place] = t, correction(key, float(steps), group, ours=not is_torch(rule))
        return kept, debias


def correction(name: str, steps: float, group: Mapping[str, Any], *, ours: bool = False) -> float:
    """1 - b2^t for Adam's second moment, or one of ours, after t steps; 1 for what has none."""
    if (name != "exp_avg_sq" and not ours) or "betas" not in group:
        return 1.0
    return 1 - float(group["betas"][1]) ** steps or 1.0
