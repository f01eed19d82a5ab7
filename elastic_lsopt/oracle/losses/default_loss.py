"""The loss of a model that brings its own, as Hugging Face's do: which it is, and what weighs a micro-batch of it.

    model                                          loss                       weight
    causal LM of the usual kind                    split: causal_lm_loss      unmasked targets
    …ForSequenceClassification                     split: classification      unmasked samples
    any other, a router's loss included            model(**batch).loss        unmasked labels where it is a mean over
                                                                              them, else samples

A model's name does not say whether its loss shifts the labels (Bart's causal LM does not) or adds a term (Mixtral's
router), so its own loss is taken unless its code shows that it is the usual one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.losses.loss import (
    Loss,
    LossFunction,
    Unsplit,
    causal_lm_loss,
    classification_loss,
    refuse_labels_out_of_range,
    samples,
    unmasked,
)

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_MEAN_OVER_LABELS = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|Classification|Choice)$")


def as_loss(loss_fn: Loss | LossFunction | None, module: nn.Module) -> Loss | Unsplit:
    """What the user gave, or the model's own loss, by the table above.

    Raises UserError where there is no default.
    """
    if isinstance(loss_fn, Loss | Unsplit):
        return loss_fn
    if loss_fn is not None:
        return Unsplit(loss_fn)
    model = _unwrapped(module)
    kind = type(model).__name__
    if _CAUSAL.search(kind) and _is_usual_causal_lm(model):
        return causal_lm_loss()
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    classifies = problem in (None, "single_label_classification") and getattr(model, "num_labels", 2) > 1
    if kind.endswith("ForSequenceClassification") and classifies and not hasattr(model, "_loss_function"):
        return _sequence_classification(model) if problem is None else classification_loss(several=False)
    if hasattr(model, "config"):
        return _own(model)
    raise UserError(
        f"loss_fn is missing and {kind} is no Hugging Face model with a default loss; pass "
        "loss_fn=lambda model, batch: … (the mean loss of the batch) or lso.Loss(forward, criterion, count)."
    )


def adds_router_loss(module: nn.Module) -> bool:
    """Whether a mixture of experts adds its routers' load-balancing loss to that of its tokens."""
    config = getattr(_unwrapped(module), "config", None)
    configs = (config, getattr(config, "text_config", None))
    return any(getattr(c, "output_router_logits", False) is True for c in configs)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile and of an adapter."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and hasattr(module, "get_base_model"):
            inner = module.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _is_usual_causal_lm(model: nn.Module) -> bool:
    """Whether its loss is the cross-entropy of the next token and nothing else."""
    if not hasattr(model, "loss_function"):
        return True  # not of transformers: it may have no loss at all, only a name that says what it is for
    return _calls_usual_loss(model) and not adds_router_loss(model)


def _calls_usual_loss(model: nn.Module) -> bool:
    usual = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    return usual and "self.loss_function(" in _source(model)


def _source(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # made at run time
        return ""


def _shifts(model: nn.Module) -> bool:
    """Whether label i + 1 is compared with logits i, so that the first label of a row counts for nothing."""
    if _calls_usual_loss(model):
        return True
    source = _source(model)
    if re.search(r"labels\[[^\]]*1:", source):
        return True
    has_its_own = "CrossEntropyLoss" in source or "cross_entropy(" in source
    return bool(_CAUSAL.search(type(model).__name__)) and not has_its_own


def _own(model: nn.Module) -> Unsplit:
    """`model(**batch).loss`."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        try:
            return model(**batch).loss
        except IndexError:
            classes = config.num_labels if "Classification" in kind else getattr(config, "vocab_size", None)
            if isinstance(batch.get("labels"), Tensor) and isinstance(classes, int):
                refuse_labels_out_of_range(batch["labels"], classes)
            raise

    kind = type(model).__name__
    config: Any = model.config
    counted = bool(_MEAN_OVER_LABELS.search(kind))
    return Unsplit(loss, _labels_or_samples(_shifts(model)) if counted else samples, _outputs)


def _labels_or_samples(shifts: bool) -> Callable[[Any], float | Tensor]:
    def count(batch: Mapping[str, Any]) -> float | Tensor:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or not labels.dim() or labels.is_floating_point():
            return samples(batch)
        return unmasked(labels[..., 1:] if shifts and labels.dim() > 1 else labels)

    return count


def _outputs(model: Any, batch: Mapping[str, Any]) -> list[Any]:
    """What the loss is made of."""
    return [value for name, value in model(**batch).items() if not name.endswith("loss")]


def _sequence_classification(model: nn.Module) -> Loss:
    """One class a sample or several, by the labels; noted in the config as transformers does, for who loads it."""
    plain = classification_loss()

    def criterion(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if batch["labels"].is_floating_point():
            config.problem_type = "multi_label_classification"
        return plain.criterion(logits, batch)

    config: Any = model.config
    return Loss(plain.forward, criterion, plain.count, plain.curvature, plain.sample)
