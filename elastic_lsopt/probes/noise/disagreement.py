"""How far replicas have drifted apart: what an exchange tells of it anyway, at no gradient of its own.

    G_ij = <x_i - m, x_j - m>,  m = mean_i x_i          R x R numbers that a reduction of the replicas leaves behind
    consensus distance   sqrt(tr G / R)                 root mean square; Kong, Lin, Koloskova, Jaggi, Stich 2021
    valley width         mean_i sqrt(G_ii)              what DPPF's push holds open, arXiv 2507.20424
    shares               s_k / tr G                     of the principal directions, s the eigenvalues of G, falling
    effective rank       exp(-sum_k p_k log p_k), p_k = sqrt(s_k) / sum_j sqrt(s_j)      Roy and Vetterli 2007

Replicas of local SGD differ most where the loss is sharp (Dimlioglu, Topollai, Choromanska 2026, "Worker Disagreement
Reveals Sharp Directions in Local SGD", arXiv 2605.27739). So a replica may keep its differences from the mean of the
last exchanges, d_1 … d_K, and see what of the step's own gradient g lies in their span, B an orthonormal basis of it:

    gradient share       |B g|^2 / |g|^2                by chance: rank / numbers of the model
    with the top eigenvectors u_1 … u_k of the Hessian, where a probe has them:
    span share           sum_j |B u_j|^2 / rank         how much of the span lies in their space; by chance k / numbers
    eigenvector shares   |B u_j|^2                      how much of each lies in the span; by chance rank / numbers
    energy share         sum_ij <d_i, u_j>^2 / sum_i |d_i|^2       the span share, larger differences counting more

Cost: none beside the steps. Memory: nothing; K Vectors for the span. Communication: nothing; for the span an all-reduce
of K (K + 1) numbers within the replica, at the step after an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.by_name import require_count
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.probes.spectrum.orthonormal import ROUNDING, whitening
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

FAMILY = "disagreement"
"""The name of the family of state of what a replica keeps for its span."""
MOST_SHARES = 8
"""Principal directions whose shares are told."""


@dataclass(frozen=True)
class Disagreement:
    """What one exchange tells: `gram` is G of its members in order, fp64, on the host, as `Replicas.gram` gives it."""

    gram: Tensor

    @property
    def distances(self) -> list[float]:
        """Of each member from the mean."""
        return self.gram.diagonal().clamp(min=0).sqrt().tolist()

    @property
    def consensus_distance(self) -> float:
        """Root mean square of the distances."""
        return math.sqrt(max(0.0, float(self.gram.trace())) / len(self.gram))

    @property
    def valley_width(self) -> float:
        """Mean of the distances."""
        return math.fsum(self.distances) / len(self.gram)

    @property
    def strengths(self) -> Tensor:
        """The eigenvalues of G, falling: of R members R - 1, as their differences sum to zero; rounding left out."""
        values = torch.linalg.eigvalsh(self.gram).flip(0)[:-1]
        return values[values > ROUNDING * torch.finfo(torch.float64).eps * values[:1].clamp(min=0)]

    @property
    def shares(self) -> list[float]:
        """Of the principal directions; none where all members are alike."""
        strengths = self.strengths
        return (strengths / strengths.sum()).tolist()

    @property
    def effective_rank(self) -> float:
        """In how many directions they differ: 0 where they are alike, at most one less than members are there."""
        p = self.strengths.sqrt()
        p = p / p.sum()
        return math.exp(-float((p * p.log()).sum())) if len(p) else 0.0

    def to_json(self) -> dict[str, Any]:
        """As a step's row tells it; no numbers where they are not finite."""
        if not bool(self.gram.isfinite().all()):
            return {}
        return {
            "consensus_distance": self.consensus_distance, "valley_width": self.valley_width,
            "distances": self.distances, "shares": self.shares[:MOST_SHARES], "effective_rank": self.effective_rank,
        }  # fmt: skip


@dataclass(frozen=True)
class DisagreementSpan(Stateful):
    """A replica's differences from the mean of its last `exchanges` >= 1 exchanges: a family of state (see the module).

    `keep` takes one in when an exchange takes effect; the gradient of the next step that is not skipped is measured.
    """

    exchanges: int
    name: str = FAMILY

    def __post_init__(self) -> None:
        require_count("exchanges", self.exchanges)

    def init(self, space: ParameterSpace) -> State:
        return {"kept": 0, "due": 0, **{name: space.zeros() for name in self._names}}

    @property
    def _names(self) -> list[str]:
        return [f"gap/{i}" for i in range(self.exchanges)]

    def keep(self, state: dict[str, Any], gap: Vector, within: Callable[[Vector], Vector] | None = None) -> None:
        """The replica's difference from the mean at an exchange, in place of the oldest that is kept.

        `within` finds the gap's part of a Vector of the whole space, where it is of some parameters; the others did
        not differ then. No communication.
        """
        place: Vector = state[self._names[-1]]
        for older, newer in pairwise(reversed(self._names)):
            state[older] = state[newer]
        state[self._names[0]] = place
        if within is not None:
            place.zero_()
        (place if within is None else within(place)).copy_(gap)
        surplus = {n for n in state if n.startswith("gap/")} - {*self._names}  # of a longer span, before a resume
        for name in ("share", "rank", *surplus):
            state.pop(name, None)
        state |= {"kept": min(state["kept"] + 1, self.exchanges), "due": 1}

    def before_step(self, space: ParameterSpace, gradient: Vector, samples: int, state: State) -> None:
        """The step's gradient against the span, once per exchange; one all-reduce within the replica."""
        if not state["due"]:
            return
        state["due"] = 0
        gaps = self._gaps(state)
        products = space.products(gaps, [*gaps, gradient])
        inside = whitening(products[:, :-1], space.dtype) @ products[:, -1]
        square = space.norm(gradient) ** 2
        if len(inside) and square:
            state |= {"share": float(inside.square().sum()) / square, "rank": len(inside)}

    def told(self, space: ParameterSpace, state: Mapping[str, Any]) -> dict[str, Any]:
        """What a step's row tells of the newest exchange; nothing where no gradient has been measured since."""
        if "share" not in state:
            return {}
        share, rank = min(1.0, state["share"]), state["rank"]
        return {"span": rank, "gradient_share": share, "gradient_share_by_chance": rank / space.layout.numel}

    def beside(self, space: ParameterSpace, state: Mapping[str, Any], eigenvectors: Basis) -> dict[str, Any]:
        """The span beside orthonormal eigenvectors; nothing where there is none yet (collective in the replica).

        Memory: a Vector for each eigenvector. One all-reduce.
        """
        gaps, k = self._gaps(state), len(eigenvectors)
        products = space.products(gaps, [*gaps, *eigenvectors])
        gram, along = products[:, : len(gaps)], products[:, len(gaps) :]
        inside = (whitening(gram, space.dtype) @ along).square()
        if not len(inside) or not k:
            return {}
        rank, numbers = len(inside), space.layout.numel
        return {
            "span": rank, "span_share": float(inside.sum()) / rank, "span_share_by_chance": k / numbers,
            "eigenvector_shares": inside.sum(0).tolist(), "eigenvector_share_by_chance": rank / numbers,
            "energy_share": float(along.square().sum() / gram.trace()),
        }  # fmt: skip

    def _gaps(self, state: Mapping[str, Any]) -> list[Vector]:
        return [state[name] for name in self._names[: state["kept"]]]
