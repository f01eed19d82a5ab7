"""What a step minimises: a mean over samples or tokens, with the weight that makes the mean of means exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic_lsopt.errors import UserError

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss in three steps: `criterion(forward(model, batch), batch)` is the mean over `count(batch)` terms.

    `count` weighs the batch among the others of the step: samples, or unmasked tokens; as a number, or as a 0-d tensor
    where reading the number would wait for a GPU. What products with the
    Gauss-Newton matrix need is the split into forward and criterion.
    """

    forward: Callable[[Any, Any], Any]
    criterion: Callable[[Any, Any], Tensor]
    count: Callable[[Any], float | Tensor]
    curvature: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    """(logits, batch, t) -> the criterion's Hessian by the logits, times t; may overwrite t. None: by autograd."""
    sample: Callable[[Tensor, Any], Any] | None = None
    """(logits, batch) -> the batch with labels drawn from the model, by torch's default generators; what is masked
    stays masked. For updates that estimate curvature by it (sophia_g)."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The mean loss of the batch, a 0-d tensor."""
        return self.criterion(self.forward(model, batch), batch)

    def output_product(self, logits: Tensor, batch: Any, t: Tensor) -> Tensor:
        """B t for the Hessian B of the criterion by the logits; may overwrite t."""
        if self.curvature is not None:
            return self.curvature(logits, batch, t)
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            [g] = torch.autograd.grad(self.criterion(z, batch), z, create_graph=True)
            return torch.autograd.grad(g, z, t)[0] if g.requires_grad else torch.zeros_like(t)


ROWS = 4096
"""Rows of logits whose probabilities are in memory at once in `cross_entropy_product_`."""


def cross_entropy_product_(logits: Tensor, weights: Tensor, t: Tensor) -> Tensor:
    """t <- B t for L = sum_i w_i CE(z_i), row by row: B_i = w_i (diag p_i - p_i p_i'), p = softmax z.

    logits and t (n, classes), weights (n,). Beside these, memory of ROWS rows: the probabilities of a whole batch
    (batch, sequence, vocabulary) are never there at once.
    """
    for z, w, row in zip(logits.split(ROWS), weights.split(ROWS), t.split(ROWS), strict=True):
        p = torch.softmax(z.to(row.dtype), dim=-1)
        row.sub_(torch.linalg.vecdot(p, row)[:, None]).mul_(p).mul_(w[:, None])
    return t


def samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor. Raises UserError where it holds none."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise UserError(
        f"a micro-batch of type {type(batch).__name__} holds no tensor with a first dimension, so its samples "
        "cannot be counted; pass lso.Loss(forward, criterion, count)."
    )


@dataclass(frozen=True)
class Unsplit:
    """A loss in one step, `function(model, batch)`: a mean over `count(batch)` terms."""

    function: LossFunction
    count: Callable[[Any], float | Tensor] = samples
    outputs: Callable[[Any, Any], Any] | None = None
    """(model, batch) -> what the loss is made of, where that can be had without it."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return self.function(model, batch)


def unmasked(labels: Tensor) -> Tensor:
    """How many labels are not -100: a 0-d tensor, because reading the number would wait for a GPU."""
    return (labels != -100).sum()


def refuse_labels_out_of_range(labels: Tensor, classes: int) -> None:
    """Raise UserError naming the first label that is no class and its sample, a row of `labels`."""
    outside = (labels != -100) & ((labels < 0) | (labels >= classes))
    if outside.any():
        row = outside.reshape(len(labels), -1).any(1).nonzero()[0].item()
        raise UserError(
            f"label {labels[outside][0].item()} of sample {row} of a micro-batch is outside of 0 … {classes - 1}, the "
            "classes that the model knows; mend the data, or give the model more classes (-100 masks a label)."
        )


def _total_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over labels (rows …) that are not masked; logits (rows …, classes)."""
    try:
        return nn.functional.cross_entropy(
            _wide(logits).flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
        )
    except IndexError:  # of a CPU's kernel
        refuse_labels_out_of_range(labels, logits.shape[-1])
        raise


def _wide(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _drawn(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels (rows …) drawn from the softmax of logits (rows …, classes), of which ROWS rows are there at once."""
    parts = [torch.multinomial(torch.softmax(_wide(z), -1), 1)[:, 0] for z in logits.flatten(0, -2).split(ROWS)]
    return torch.where(labels == -100, labels, torch.cat(parts).view(labels.shape))


def causal_lm_loss() -> Loss:
    """The mean cross-entropy of the next token over the unmasked targets (-100 masks); logits are cast to fp32."""

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    def count(batch: Mapping[str, Tensor]) -> Tensor:
        return unmasked(batch["labels"][..., 1:])

    def criterion(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        total = _total_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
        return total / count(batch).clamp(min=1)

    def curvature(logits: Tensor, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        # The last position predicts nothing: its weight is 0.
        kept = nn.functional.pad(batch["labels"][..., 1:] != -100, (0, 1)).to(t.dtype)
        weights = kept / count(batch).clamp(min=1)
        t = t.contiguous()
        cross_entropy_product_(logits.flatten(0, -2), weights.flatten(), t.flatten(0, -2))
        return t

    def sample(logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"].clone()
        labels[..., 1:] = _drawn(logits[..., :-1, :], labels[..., 1:])
        return {**batch, "labels": labels}

    return Loss(forward, criterion, count, curvature, sample)


def classification_loss(*, several: bool = True) -> Loss:
    """The mean loss over samples of a model with `.logits` (b, classes), or of one from `x` to logits.

    Labels of whole numbers (b,) are classes: cross-entropy, -100 masks. Labels of floats (b, classes), each in 0 … 1,
    say which classes a sample has (`several`): binary cross-entropy, its mean over the classes.
    """

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if set(inputs) == {"x"}:
            return model(inputs["x"])
        return model(**inputs).logits

    def count(batch: Mapping[str, Tensor]) -> float | Tensor:
        labels = batch["labels"]
        return float(len(labels)) if labels.is_floating_point() else unmasked(labels)

    def criterion(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        if several and labels.is_floating_point() and labels.shape == logits.shape:
            return nn.functional.binary_cross_entropy_with_logits(_wide(logits), labels.to(_wide(logits).dtype))
        if labels.is_floating_point() or labels.numel() * logits.shape[-1] != logits.numel():
            raise UserError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit logits of shape "
                f"{tuple(logits.shape)}: give whole numbers of shape {tuple(logits.shape[:-1])}"
                + (f", or for several classes a sample floats of shape {tuple(logits.shape)}." if several else ".")
            )
        return _total_cross_entropy(logits, labels) / unmasked(labels).clamp(min=1)

    def curvature(logits: Tensor, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        labels = batch["labels"]
        if labels.is_floating_point():
            p = logits.to(t.dtype).sigmoid()
            return t * (p * (1 - p) / p.numel())
        weights = (labels != -100).to(t.dtype) / unmasked(labels).clamp(min=1)
        return cross_entropy_product_(logits, weights, t.contiguous())

    def sample(logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        if labels.is_floating_point():
            return {**batch, "labels": torch.bernoulli(_wide(logits).sigmoid()).to(labels.dtype)}
        return {**batch, "labels": _drawn(logits, labels)}

    return Loss(forward, criterion, count, curvature, sample)


def refuse_coupled_samples(module: nn.Module) -> None:
    """Raise UserError for batch norm in training mode: it couples the samples of a micro-batch."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            raise UserError(
                f"{name or 'the model'} ({type(child).__name__}) is in training mode and couples the samples of a "
                "micro-batch; put it in eval mode (frozen statistics) or use GroupNorm or LayerNorm."
            )


def idle(loss: Loss | Unsplit, model: Any, batch: Any) -> Tensor:
    """Zero, with zero gradient, but still connected: an idle slot takes part in every collective and adds nothing.

    Selected, never multiplied. Where it can be, the loss is cut before its mean, whose backward is NaN however small
    its weight where it divides by a count of zero (all labels masked).
    """
    outputs = loss.forward if isinstance(loss, Loss) else loss.outputs
    if outputs is not None:
        leaves = tree_leaves(outputs(model, batch))
        values = [t.sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    else:
        values = [loss(model, batch)]
    if not values:
        raise UserError("forward of lso.Loss returned no tensor that needs a gradient; return the logits.")
    value = sum(values[1:], values[0])
    return torch.where(torch.zeros((), dtype=torch.bool, device=value.device), value, torch.zeros_like(value))
