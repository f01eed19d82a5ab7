"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, which is turned now and then.

    of a matrix G (r x c), s = 0, 1, …; in step 0 nothing moves:
        L = b2 L + (1 - b2) G G^T,  R = b2 R + (1 - b2) G^T G        after the step; Q_L, Q_R: eigenvectors, in step 0
        G' = Q_L^T G Q_R
        m  = b1 m + (1 - b1) G',  v = b2 v + (1 - b2) G'^2           both in the basis
        W  = W - lr sqrt(1 - b2^s) / (1 - b1^s) Q_L (m / (sqrt(v) + eps)) Q_R^T
        W  = W - lr wd W
        every k-th step: Q = QR(L Q) with columns in falling order of diag(Q^T L Q), v in the same order, m turned
    a side longer than `most` keeps its own axes; vectors, and what has no other side, take the same step unturned

Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade: "SOAP: Improving and Stabilizing Shampoo using
Adam", ICLR 2025, arXiv 2409.11321, Algorithm 3, by the authors' file. Rest point: most = 0 is Adam whose eps stands
beside the uncorrected root, one step late.

Differs from the authors' file in nothing of the arithmetic: they turn m back and forth in each step, here it is turned
when the basis is. Decompositions are in fp32. Where a gradient has less rank than sides, the basis of what is left is
as rounding has it, and so are the steps there, in their code as in ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elastic_lsopt.by_name import require_betas, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.dealing import Dealing
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.owned import OwnedSpace, wholes
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, keep_numbers, numbers

Bases = Sequence[Tensor | None]
"""One a side; None: its own axes."""


@register("soap")
@dataclass(frozen=True, kw_only=True)
class SOAP(Update):
    """Time: this rank's share of the matrices. Memory: two Vectors, and 2 r^2 + 2 c^2 numbers of each matrix r x c on
    the rank that it is dealt to.

    Communication: an all-to-all of the gradients and one of the steps (one all-gather where all ranks hold all). Raises
    UserError for a value out of range, and for param groups whose hyper-parameters differ.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Vyas et al. 2025, arXiv 2409.11321",
        memory="2, and 2 (r^2 + c^2) per matrix r x c, each on one rank",
        communication="two all-to-alls per step",
        needs="matrices",
    )
    decoupled_weight_decay: ClassVar[bool] = True
    together: ClassVar[bool] = True

    betas: tuple[float, float] = (0.95, 0.95)
    """b1 and b2; each >= 0 and < 1. The authors: 0.95, 0.95."""
    eps: float = 1e-8
    """Beside the root of v, whose mean is not corrected; >= 0."""
    every: int = 10
    """k, the steps from one basis to the next; >= 1. The authors: 10 (precondition_frequency)."""
    most: int = 10_000
    """Longest side that is turned; >= 0. The authors: 10,000 (max_precond_dim), which leaves out most vocabularies."""

    def __post_init__(self) -> None:
        require_betas(self.betas)
        require_number("eps", self.eps)
        require_count("every", self.every)
        require_count("most", self.most, least=0)

    def _turned(self, space: ParameterSpace) -> list[int]:
        """The numbers of the parameters that have a side to turn."""
        shapes = [p.shape for p in space.layout.parameters]
        return [i for i, shape in enumerate(shapes) if len(shape) > 1 and min(shape) <= self.most]

    def init(self, space: ParameterSpace) -> State:
        turned, parameters = self._turned(space), space.layout.parameters
        dealt = [parameters[i] for i in turned]
        mine = [parameters[i].name for i in _dealing(space, turned).mine] if turned else []
        like = torch.empty(0, dtype=space.dtype, device=space.shards.device)

        def owned(shapes: dict[str, tuple[int, ...]]) -> Vector:
            return OwnedSpace(space, shapes, mine, like).zeros()

        rest = space.restricted([i for i in range(len(parameters)) if i not in turned])
        state: State = {"m": owned({p.name: p.shape for p in dealt}), "v": owned({p.name: p.shape for p in dealt})}
        state |= {"plain_m": rest.zeros(), "plain_v": rest.zeros()} if rest.layout.parameters else {}
        for side in range(max((len(p.shape) for p in dealt), default=0)):
            long = {p.name: p.shape[side] for p in dealt if len(p.shape) > side and p.shape[side] <= self.most}
            for key in ("gram", "basis"):
                state[f"{key}{side}"] = owned({name: (n, n) for name, n in long.items()})
        return state

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        (b1, b2), turned, w = self.betas, self._turned(space), space.weights
        before = numbers(space, state, "step", -1)
        steps = [int(s) + (i not in rates.alone) for i, s in enumerate(before)]
        keep_numbers(space, state, "step", steps)
        moves = [s > 0 and i not in rates.alone for i, s in enumerate(steps)]
        rows = zip(rates.lr, steps, moves, strict=True)
        alphas = [-lr * (1 - b2**s) ** 0.5 / (1 - b1**s) if moved else 0.0 for lr, s, moved in rows]
        if turned:
            part = space.restricted(turned)
            dealing = _dealing(space, turned)
            given = dealing.gather(_pieces(part, space, gradient))
            made = {i: torch.zeros_like(g) for i, g in given.items() if i in rates.alone}
            made |= self._turned_steps(space, {i: g for i, g in given.items() if i not in made}, state, steps)
            found = Vector(part, [t.to(space.shards.device) for t in dealing.scatter(made)])
            part.weights.add_each_(found, [alphas[i] for i in turned])
        if "plain_m" in state:
            rest = state["plain_m"].space
            others = [i for i in range(len(steps)) if i not in turned]
            g = Vector(rest, _pieces(rest, space, gradient))
            began = [float(moves[i]) for i in others]
            m = state["plain_m"].lerp_each_(g, [(1 - b1) * b for b in began])
            v = state["plain_v"].lerp_each_(g * g, [(1 - b2) * b for b in began])
            rest.weights.add_each_(g.copy_(m).div_(v.clone().sqrt_().add_(self.eps)), [alphas[i] for i in others])
        pairs = zip(rates.lr, rates.weight_decay, moves, strict=True)
        w.mul_each_([1 - lr * decay if moved else 1.0 for lr, decay, moved in pairs])

    def _turned_steps(
        self, space: ParameterSpace, given: dict[int, Tensor], state: dict[str, Any], steps: Sequence[int]
    ) -> dict[int, Tensor]:
        """Steps of the tensors that are dealt to this rank, from their gradients; what is kept of them moves on."""
        vectors = {key: value for key, value in state.items() if isinstance(value, Vector)}
        kept = {key: wholes(value) for key, value in vectors.items() if isinstance(value.space, OwnedSpace)}
        made = {}
        for i, g in given.items():
            name, s, sides = space.layout.parameters[i].name, steps[i], range(g.dim())
            grams = [kept[f"gram{side}"].get(name) for side in sides]
            stored = [kept[f"basis{side}"].get(name) for side in sides]
            bases: Bases = [None if t is None else t.to(g.device) for t in stored]
            made[i] = torch.zeros_like(g)
            if s:
                m, v = (kept[key][name] for key in ("m", "v"))
                there = turn(g, bases)
                m.lerp_(there.to(m.device), 1 - self.betas[0])
                v.lerp_(there.square_().to(v.device), 1 - self.betas[1])
                made[i] = turn((m / v.sqrt().add_(self.eps)).to(g.device), bases, back=True)
            for side, gram in enumerate(grams):
                if gram is not None:
                    rows = g.movedim(side, 0).flatten(1)
                    gram.lerp_((rows @ rows.T).to(gram.device), 1 - self.betas[1])
            if s % self.every == 0:
                self._new_bases(s, name, grams, stored, kept)
        return made

    def _new_bases(self, s: int, name: str, grams: Bases, stored: Bases, kept: dict[str, dict[str, Tensor]]) -> None:
        """Eigenvectors in step 0, later one power iteration and QR; m and v are those of the new basis then."""
        m, v = (kept[key][name] for key in ("m", "v"))
        m.copy_(turn(m, stored, back=True))
        for side, (gram, basis) in enumerate(zip(grams, stored, strict=True)):
            if gram is None or basis is None:
                continue
            if not s:
                basis.copy_(eigenvectors(gram))
                continue
            ahead = gram @ basis
            order = (basis * ahead).sum(0).argsort(descending=True)
            v.copy_(v.index_select(side, order))
            basis.copy_(torch.linalg.qr(ahead.index_select(1, order).float())[0])
        m.copy_(turn(m, stored))


def eigenvectors(gram: Tensor) -> Tensor:
    """In falling order of their eigenvalues, in fp32."""
    wide = gram.float()
    return torch.linalg.eigh(wide + 1e-30 * torch.eye(len(wide), device=wide.device))[1].flip(1)


def turn(t: Tensor, bases: Bases, *, back: bool = False) -> Tensor:
    """Each side into its basis, or out of it: Q_L^T t Q_R, or Q_L t Q_R^T. A copy, also where all sides stay."""
    for basis in bases:  # the first side goes to the end each time, so that all are in place after the last
        t = t.movedim(0, -1)
        t = t if basis is None else t @ (basis.T if back else basis)
    return t.contiguous().clone()


def _dealing(space: ParameterSpace, turned: Sequence[int]) -> Dealing:
    return space.shards.dealing(turned, space.dtype)


def _pieces(part: Any, space: ParameterSpace, whole: Vector) -> list[Tensor]:
    """The tensors of a Vector of the space that are of some of its parameters."""
    return whole.tensors if part is space else part.shards.of(whole.tensors)
