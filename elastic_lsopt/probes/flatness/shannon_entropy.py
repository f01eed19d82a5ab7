"""Shannon entropy of the model's outputs: how undecided its predictions are.

    (1/n) sum_i - sum_c p_ic log p_ic          p = softmax of the logits; i a sample, or an unmasked next token

Pereyra, Tucker, Chorowski, Kaiser, Hinton 2017, "Regularizing Neural Networks by Penalizing Confident Output
Distributions"; a measure in Bisla, Wang, Choromanska 2022, "Low-Pass Filtering SGD …", whose code this is. In nats.

Cost: one forward; memory: the probabilities of ROWS rows of logits; communication: one all-reduce of a number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.losses.loss import ROWS
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class ShannonEntropy:
    """`value` in nats, between 0 and log of the number of classes."""

    value: float
    forwards: int
    seconds: float


@full_precision()
def shannon_entropy(space: ParameterSpace, oracle: Oracle) -> ShannonEntropy:
    """The mean entropy over the batch, each unit weighed as in the loss (collective).

    Raises UserError for an oracle made of closures and for a loss that is no lso.Loss, NonFinite where logits are inf
    or NaN.
    """
    began = time.monotonic()
    if not isinstance(oracle, MicroBatchOracle):
        raise UserError("shannon_entropy needs the logits; use lso.attach(model, lso.Loss(…), batches), not a closure.")
    value = oracle.mean_over_logits(_mean_entropy)
    if not isfinite(value):
        raise NonFinite(f"the Shannon entropy is {value}: the logits hold inf or NaN.")
    return ShannonEntropy(value, 1, time.monotonic() - began)


def _mean_entropy(logits: Tensor, batch: Any) -> Tensor:
    """The mean over rows; of a language model over the positions whose next token counts (-100 masks)."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if logits.dim() == 3 and isinstance(labels, Tensor) and labels.shape == logits.shape[:2]:
        kept = labels[:, 1:] != -100
        each = _entropies(logits[:, :-1])[kept]
        return each.sum() / max(len(each), 1)
    return _entropies(logits).mean()


def _entropies(logits: Tensor) -> Tensor:
    out = []
    for rows in logits.flatten(0, -2).split(ROWS):
        log_p = torch.log_softmax(rows.double() if rows.dtype == torch.float64 else rows.float(), dim=-1)
        out.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(out).view(logits.shape[:-1])
