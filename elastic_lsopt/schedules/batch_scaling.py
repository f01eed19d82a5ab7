"""How the hyper-parameters follow the global batch B: four rules, each its paper's, as pure functions.

    k = B' / B                          linear      sqrt          adascale    none
    rate            eta'                k eta       sqrt(k) eta   r eta       eta
    Adam's betas    1 - beta'           -           k (1 - beta)  -           -
    Adam's epsilon  eps'                -           eps/sqrt(k)   -           -
    momentum                            -           -             -           -       kept, and its buffer with it
    EMA of weights  rho'                rho^k       rho^k         rho^k       rho^k
    AdamW's decay   lambda'             k lambda eta / eta': the decay per sample, eta lambda / B, stays

linear: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv 1706.02677. sqrt: Malladi et al., "On the SDEs and
Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022, arXiv 2205.10287, for Adam; valid while k (1 - beta) < 1.
adascale: Johnson et al., "AdaScale SGD", ICML 2020, arXiv 2007.05105, r the measured gain. EMA: Busbridge et al.,
"How to Scale Your EMA", NeurIPS 2023, arXiv 2307.13813.

What else holds, and why:
- torch keeps the rate outside the momentum buffer, so a new rate needs no correction of it (Goyal's remark 2).
- Weight decay that is added to the gradient (adam, sgd, lars) or inside a trust ratio (lamb) stays; adamw's and
  muon's, which shrink the weights themselves, follow as AdamW's.
- SAM's rho and LPF-SGD's gamma stay: both are lengths in the space of the weights, set by its geometry and not by the
  noise of a batch. (SAM ascends here along the gradient of the whole batch; a larger batch sees less sharpness, which
  no rule mends. Parts are cut by micro-batches, so with the micro-batches a worker kept a part grows with the batch.)
- sqrt with sgd and linear with adam change the rate alone: sqrt keeps the variance of SGD's step (Krizhevsky 2014,
  arXiv 1404.5997), linear with Adam leaves the SDE that Malladi derive. Both are a user's choice, never the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from elastic_lsopt.schedules.adascale import Gain

Rule = Literal["linear", "sqrt", "adascale", "none"]
TINY = 1e-9
"""1 - 0.9 is a little less than 0.1."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What an optimizer step takes, and the batch that it is for; None: the job has no such thing."""

    global_batch_size: int
    """Samples of a step, over all ranks; >= 1."""
    learning_rate: float
    """Peak rate, before the schedule; >= 0."""
    betas: tuple[float, float] | None = None
    epsilon: float | None = None
    momentum: float | None = None
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    """Whether decay acts on the weights themselves (AdamW, Muon), and not through the gradient (Adam, SGD, LARS)."""
    ema_decay: float | None = None
    """Share of an average of the weights that a step keeps, in [0, 1)."""
    rho: float | None = None
    gamma: float | None = None

    @classmethod
    def of_group(cls, group: Mapping[str, Any], global_batch_size: int) -> Hyperparameters:
        """What a param group of a torch optimizer says, for the batch that it was chosen for."""
        betas = group.get("betas")
        return cls(
            global_batch_size=global_batch_size,
            learning_rate=float(group["lr"]),
            betas=(float(betas[0]), float(betas[1])) if betas is not None else None,
            epsilon=group.get("eps"),
            momentum=group.get("momentum"),
            weight_decay=float(group.get("weight_decay", 0.0)),
            decoupled_weight_decay=bool(group.get("decoupled_weight_decay", False)),
        )

    def into_group(self, group: dict[str, Any], schedule: float = 1.0) -> None:
        """Set a param group to this, its rate times the schedule's share of the peak, in [0, 1]."""
        said = {
            "lr": self.learning_rate * schedule, "betas": self.betas, "eps": self.epsilon,
            "momentum": self.momentum, "weight_decay": self.weight_decay,
        }  # fmt: skip
        group.update({key: value for key, value in said.items() if key in group and value is not None})


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A rule at one batch, as factors on any hyper-parameters of the reference; 1 everywhere: the reference itself."""

    rate: float = 1.0
    forgetting: float = 1.0
    """Of 1 - beta."""
    epsilon: float = 1.0
    weight_decay: float = 1.0
    """Where it is decoupled."""
    ema: float = 1.0
    """The exponent of an average's decay."""

    def of(self, own: Hyperparameters, batch: int) -> Hyperparameters:
        """The reference's hyper-parameters `own`, for a global batch of `batch` samples."""
        return replace(
            own,
            global_batch_size=batch,
            learning_rate=self.rate * own.learning_rate,
            betas=None if own.betas is None else (self._beta(own.betas[0]), self._beta(own.betas[1])),
            epsilon=None if own.epsilon is None else self.epsilon * own.epsilon,
            weight_decay=(self.weight_decay if own.decoupled_weight_decay else 1.0) * own.weight_decay,
            ema_decay=None if own.ema_decay is None else own.ema_decay**self.ema,
        )

    def _beta(self, beta: float) -> float:
        # No momentum (0) stays none; a factor of 1 leaves the very same float.
        return 1 - self.forgetting * (1 - beta) if beta > 0 and self.forgetting != 1 else beta


def scaling(
    reference_batch: int, batch: int, rule: Rule, *, gain: Gain | None = None,
    rates: tuple[float, float] = (0.0, math.inf),
) -> Scaling:  # fmt: skip
    """The rule from one global batch to another; adascale without a measured `gain` leaves the rate.

    `rates` are bounds on the rate's factor.
    """
    k = batch / reference_batch
    if k == 1:
        return Scaling()
    rate = min(max(rate_factor(reference_batch, batch, rule, gain), rates[0]), rates[1])
    return Scaling(
        rate=rate,
        forgetting=k if rule == "sqrt" else 1.0,
        epsilon=1 / math.sqrt(k) if rule == "sqrt" else 1.0,
        weight_decay=k / rate,
        ema=k,
    )


def rate_factor(reference_batch: int, batch: int, rule: Rule, gain: Gain | None = None) -> float:
    """eta' / eta; grows with the batch under every rule but none.

    >>> rate_factor(32, 128, "linear"), rate_factor(32, 128, "sqrt")
    (4.0, 2.0)
    """
    match rule:
        case "linear":
            return batch / reference_batch
        case "sqrt":
            return math.sqrt(batch / reference_batch)
        case "adascale":
            return 1.0 if gain is None else gain.ratio(reference_batch, batch)
        case "none":
            return 1.0


def permits(own: Hyperparameters, batch: int, rule: Rule, betas: tuple[float, float] | None = None) -> bool:
    """Whether the rule's formulas hold at this batch: sqrt needs k (1 - beta) < 1 for each beta (default: its own)."""
    k = batch / own.global_batch_size
    return rule != "sqrt" or all(k * (1 - beta) < 1 - TINY for beta in betas or own.betas or () if beta > 0)


def blend(old: Scaling, new: Scaling, share: float) -> Scaling:
    """On the line from `old` (share 0) to `new` (share 1), each factor for itself; never outside the two."""
    if share >= 1:
        return new

    def between(a: float, b: float) -> float:
        return min(max(a + (b - a) * max(share, 0.0), min(a, b)), max(a, b))

    return Scaling(**{f.name: between(getattr(old, f.name), getattr(new, f.name)) for f in fields(Scaling)})
