"""What a method is told of the base optimizer: its momenta and rates, whichever class it is and wherever it keeps them.

momentum        SGD's momentum_buffer, Adam's exp_avg, an update's `first_moment`
second moment   Adam's exp_avg_sq / (1 - b2^t), RMSprop's square_avg, Adagrad's sum, an update's `second_moment`; of
                AMSGrad the largest so far; not centred, and without weight decay that is in the gradient
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.oracle.base import Need
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.group_rules import is_torch
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer, updates_of

FIRST = ("momentum_buffer", "exp_avg")
"""Under which torch keeps a mean of gradients."""
SECOND = ("exp_avg_sq", "square_avg", "sum")
"""Under which torch keeps a mean, or the sum, of their squares."""
LARGEST = ("max_exp_avg_sq",)
"""Under which AMSGrad keeps the largest mean of squares so far."""
OF_OURS = {FIRST: "first_moment", SECOND: "second_moment"}
"""What an update of ours calls it."""
FIX = {
    "momentum": "give one that has (SGD with momentum > 0, AdamW, LARS, Muon)",
    "second_moment": "give one that has (AdamW, Adam, RMSprop, LAMB)",
    "sgd": "give torch.optim.SGD",
}
WORDS = {"momentum": "a base that keeps momentum", "second_moment": "a base that keeps second moments", "sgd": "SGD"}


def refuse_maximized(
    method: Method, groups: Sequence[Mapping[str, Any]], update: UpdateOptimizer | None, which: str = ""
) -> None:
    """Raise UserError for a param group that maximizes, which no method is made for, beside updates that cannot.

    `which`: what a message calls a group that is about to be added.
    """
    rising = next((i for i, group in enumerate(groups) if group.get("maximize")), None)
    if rising is None:
        return
    if not isinstance(method, Plain):
        raise UserError(
            f"{which or f'param group {rising}'} has maximize=True, and {type(method).__name__} is made for a loss "
            "that is minimized; leave it out, and give the negative of the loss."
        )
    for i, group in enumerate(groups if update is not None else ()):
        if "maximize" not in group:
            raise UserError(
                f"param group {rising} has maximize=True, and the update of group {i}, {group['update']}, has no such "
                "entry; leave it out, and give the negative of the loss."
            )


def refuse_lacking(method: Method, base: torch.optim.Optimizer | None) -> None:
    """Raise UserError where the base has not what the method needs."""
    update = updates_of(base)
    for need in sorted(getattr(method, "needs", ())):
        for group in base.param_groups if base is not None else ():
            if not _has(need, group, update.rule_of(group) if update is not None else type(base)):
                kind = group["update"] if update is not None else type(base).__name__
                without = " without momentum" if need == "momentum" and "momentum" in group else ""
                raise UserError(
                    f"{type(method).__name__} needs {WORDS[need]}, and the base is {kind}{without}; {FIX[need]}."
                )


def _has(need: Need, group: Mapping[str, Any], rule: Any) -> bool:
    if not is_torch(rule):
        key = {"momentum": "first_moment", "second_moment": "second_moment"}.get(need, "")
        return bool(getattr(rule, key, "")) and (need != "second_moment" or "betas" in group)
    adams = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
    match need:
        case "momentum":
            return issubclass(rule, (*adams, torch.optim.Adamax)) or group.get("momentum", 0) > 0
        case "second_moment":
            return issubclass(rule, (*adams, torch.optim.RMSprop, torch.optim.Adagrad))
        case _:
            return rule is torch.optim.SGD


class BaseView:
    """The base of a backend as a `Base`; see there."""

    def __init__(self, backend: Backend, space: ParameterSpace) -> None:
        self._backend, self._space = backend, space
        self._update = updates_of(backend.base)

    def momentum(self) -> Vector:
        return Vector(self._space, [m if m is not None else torch.zeros_like(w) for w, m, _ in self._kept(FIRST)])

    def second_moment(self, after: Vector | None = None) -> Vector:
        out, clipped, more = self._space.zeros(), 1.0, 0 if after is None else 1
        if after is not None and (limit := self._backend.max_grad_norm):
            clipped = min(limit / (self._space.norm(after) + 1e-6), 1.0)
        squared = after.tensors if after is not None else repeat(None)
        rows = zip(out.tensors, squared, self._groups(), self._kept(SECOND), self._kept(LARGEST), strict=False)
        for v, g, group, (_, kept, steps), (_, largest, _) in rows:
            if kept is not None:
                v.copy_(kept)
            if g is not None:
                leaves, square = shares(group), g.to(v).square()
                v.mul_(leaves[0]).add_(square, alpha=clipped**2 * leaves[1])
            if largest is not None and group.get("amsgrad"):
                v.copy_(torch.maximum(v, largest.to(v)))
            if "betas" in group:
                v.div_(1 - float(group["betas"][1]) ** (steps + more) or 1.0)
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
        """Each piece's weights, what the base keeps of it under the first of these names, and its steps so far."""
        weights = self._space.weights.tensors
        if self._update is not None:
            yield from zip(weights, *self._of_updates(self._update, names), strict=True)
            return
        for w, piece in zip(weights, self._space.layout.pieces, strict=True):
            state, _ = self._backend.state_of(piece)
            name = next((n for n in names if isinstance(state.get(n), Tensor)), None)
            if name is None:
                yield w, None, float(state.get("step", 0))
                continue
            kept = local(state[name]).view(-1)[piece.start : piece.start + piece.length]
            yield w, kept, float(state.get("step", 0))

    def _of_updates(self, base: UpdateOptimizer, names: tuple[str, ...]) -> tuple[list[Tensor | None], list[float]]:
        kept: list[Tensor | None] = [None] * len(self._space.layout.pieces)
        taken = [0.0] * len(kept)
        for bound in base.bound:
            space, state = bound.family.space, bound.family.state_dict()
            rule = base.rule_of(base.param_groups[bound.groups[0]])
            known = names if is_torch(rule) else (getattr(rule, OF_OURS.get(names, ""), ""),)
            key = next((k for k in known if isinstance(state.get(k), Vector)), None)
            if key is None:
                continue
            places = getattr(space.shards, "places", range(len(kept)))
            vector: Any = state[key]
            for place, piece, t in zip(places, space.layout.pieces, vector.tensors, strict=True):
                parameter = space.layout.parameters[piece.parameter].name
                steps: Any = state.get(f"step/{parameter}", state.get("step", 0))
                kept[place], taken[place] = t, float(steps)
        return kept, taken


def shares(group: Mapping[str, Any]) -> tuple[float, float]:
    """What is left of a base's second moment in a step, and what of the new square is added: Adagrad's is a sum."""
    decay = group["betas"][1] if "betas" in group else group.get("alpha")
    return (1.0, 1.0) if decay is None else (float(decay), 1 - float(decay))
