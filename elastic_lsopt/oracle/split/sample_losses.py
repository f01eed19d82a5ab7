"""Losses sample by sample, and the samples whose losses have risen most: a choice among all ranks' samples.

rise_i = after_i - before_i;   the n samples with the largest rises, ties by the order of the batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.losses.loss import Loss, samples


@dataclass
class SampleLosses:
    """This rank's, by place of the micro-batch: the mean loss of each sample, and its number of terms; fp64."""

    of: dict[int, Tensor] = field(default_factory=dict)
    terms: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def note(self, at: int, loss: Loss, logits: Tensor, batch: Any) -> None:
        """Of one micro-batch. Raises UserError where its logits are not one row a sample."""
        n = samples(batch)
        if not logits.dim() or logits.shape[0] != n:
            raise UserError(
                f"forward of lso.Loss returned logits of shape {tuple(logits.shape)} for {n} samples; a method that "
                "chooses samples needs one row per sample."
            )
        rows = [chosen_rows(batch, torch.tensor([i])) for i in range(n)]
        found = [loss.criterion(logits[i : i + 1], row) for i, row in enumerate(rows)]
        self.of[at] = torch.stack([x.detach().double().reshape(()) for x in found])
        counts = [torch.as_tensor(loss.count(row), dtype=torch.float64, device=logits.device) for row in rows]
        self.terms[at] = torch.stack([count.reshape(()) for count in counts])


@dataclass(frozen=True)
class Chosen:
    """Some samples of a micro-batch, and their share of the weight of all that were chosen."""

    batch: Any
    share: float


def risen(
    before: SampleLosses, after: SampleLosses, batches: Mapping[int, Any], count: int, gamma: float,
    sum_: Callable[[Tensor], Tensor], device: torch.device,
) -> dict[int, Chosen]:  # fmt: skip
    """The share `gamma` of all samples whose losses have risen most, by place of this rank's micro-batches.

    `count` micro-batches are in the batch; `sum_` sums over the ranks. Two all-reduces: a number per micro-batch, two
    per sample.
    """
    sizes = torch.zeros(count, dtype=torch.float64, device=device)
    for at, losses in after.of.items():
        sizes[at] = len(losses)
    ends = sum_(sizes).long().cumsum(0).tolist()
    table = torch.zeros(2, ends[-1], dtype=torch.float64, device=device)
    for at, losses in after.of.items():
        span = slice(ends[at] - len(losses), ends[at])
        table[0, span], table[1, span] = losses - before.of[at], after.terms[at]
    rises, terms = sum_(table).cpu()
    most = torch.argsort(rises, descending=True, stable=True)[: max(1, round(gamma * len(rises)))]
    taken = torch.zeros(len(rises), dtype=torch.bool)
    taken[most] = True
    total = float(terms[taken].sum()) or 1.0
    out = {}
    for at, losses in after.of.items():
        mine = taken[ends[at] - len(losses) : ends[at]]
        share = float(terms[ends[at] - len(losses) : ends[at]][mine].sum()) / total
        out[at] = Chosen(chosen_rows(batches[at], mine.nonzero()[:, 0]) if share else batches[at], share)
    return out


def chosen_rows(batch: Any, rows: Tensor) -> Any:
    """The batch with these of its samples: of each tensor whose first dimension counts them."""
    n = samples(batch)

    def of(value: Any) -> Any:
        rowwise = isinstance(value, Tensor) and value.dim() and value.shape[0] == n
        return value[rows.to(value.device)] if rowwise else value

    return tree_map(of, batch)
