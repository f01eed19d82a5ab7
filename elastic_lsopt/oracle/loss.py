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


@dataclass(frozen=True)
class _Whole:
    """A plain `loss_fn(model, batch)`: a mean over the batch's samples."""

    function: LossFunction

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return self.function(model, batch)

    def count(self, batch: Any) -> float:
        return float(samples(batch))


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


def _unmasked_targets(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["labels"][..., 1:] != -100).sum()


def causal_lm_loss() -> Loss:
    """The mean cross-entropy of the next token over the unmasked targets (-100 masks); logits are cast to fp32."""

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    def criterion(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        targets = batch["labels"][..., 1:].reshape(-1)
        total = nn.functional.cross_entropy(
            _wide(logits[..., :-1, :]).flatten(0, -2), targets, ignore_index=-100, reduction="sum"
        )
        return total / _unmasked_targets(batch).clamp(min=1)

    def curvature(logits: Tensor, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        # The last position predicts nothing: its weight is 0.
        kept = nn.functional.pad(batch["labels"][..., 1:] != -100, (0, 1)).to(t.dtype)
        weights = kept / _unmasked_targets(batch).clamp(min=1)
        t = t.contiguous()
        cross_entropy_product_(logits.flatten(0, -2), weights.flatten(), t.flatten(0, -2))
        return t

    return Loss(forward, criterion, _unmasked_targets, curvature)


def _wide(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def classification_loss() -> Loss:
    """The mean cross-entropy over samples (-100 masks) of a model with `.logits`, or of one from `x` to logits."""

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if set(inputs) == {"x"}:
            return model(inputs["x"])
        return model(**inputs).logits

    def count(batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["labels"] != -100).sum()

    def criterion(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        total = nn.functional.cross_entropy(_wide(logits), batch["labels"], ignore_index=-100, reduction="sum")
        return total / count(batch).clamp(min=1)

    def curvature(logits: Tensor, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        weights = (batch["labels"] != -100).to(t.dtype) / count(batch).clamp(min=1)
        return cross_entropy_product_(logits, weights, t.contiguous())

    return Loss(forward, criterion, count, curvature)


def as_loss(loss_fn: Loss | LossFunction | None, module: nn.Module) -> Loss | _Whole:
    """What the user gave, or the default: `model(**batch).loss`, split and weighed by tokens for Hugging Face models.

    Raises UserError where there is no default.
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    if loss_fn is not None:
        return _Whole(loss_fn)
    kind = type(module).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return causal_lm_loss()
    # Regression and several labels a sample have losses of their own, which transformers knows by the config.
    problem = getattr(getattr(module, "config", None), "problem_type", None)
    one_label = problem in (None, "single_label_classification") and getattr(module, "num_labels", 2) > 1
    if kind.endswith("ForSequenceClassification") and one_label:
        return classification_loss()
    if hasattr(module, "config"):
        return _Whole(lambda model, batch: model(**batch).loss)
    raise UserError(
        f"loss_fn is missing and {kind} is no Hugging Face model with a default loss; pass "
        "loss_fn=lambda model, batch: … (the mean loss of the batch) or lso.Loss(forward, criterion, count)."
    )


def refuse_coupled_samples(module: nn.Module) -> None:
    """Raise UserError for batch norm in training mode: it couples the samples of a unit."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            raise UserError(
                f"{name or 'the model'} ({type(child).__name__}) is in training mode and couples the samples of a "
                "micro-batch; put it in eval mode (frozen statistics) or use GroupNorm or LayerNorm."
            )


def idle(loss: Loss | _Whole, model: Any, batch: Any) -> Tensor:
    """Zero, with zero gradient, but still connected: an idle slot takes part in every collective and adds nothing.

    Selected, never multiplied. A split loss is cut before its criterion, whose backward is NaN however small its weight
    where it divides by a count of zero (all labels masked).
    """
    if isinstance(loss, Loss):
        leaves = tree_leaves(loss.forward(model, batch))
        values = [t.sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    else:
        values = [loss(model, batch)]
    if not values:
        raise UserError("forward of lso.Loss returned no tensor that needs a gradient; return the logits.")
    value = sum(values[1:], values[0])
    return torch.where(torch.zeros((), dtype=torch.bool, device=value.device), value, torch.zeros_like(value))
