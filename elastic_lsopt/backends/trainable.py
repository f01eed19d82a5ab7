"""The parameters that a backend takes: at least one, each with values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_lsopt.errors import UserError
from elastic_lsopt.space.layout import plain_name


def trainable(named_parameters: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Those that require a gradient, with their plain names.

    Raises UserError where there is none, for a complex one, and for a parameter on the meta device, frozen or not.
    """
    everyone = list(named_parameters)
    for name, p in everyone:
        if p.is_meta:
            raise UserError(
                f"parameter {name} is on the meta device, which has shapes and no values; build the model on a real "
                "device, or call to_empty(device=…) and load its weights, before it is trained or probed."
            )
    named = [(plain_name(name), p) for name, p in everyone if p.requires_grad]
    if not named:
        raise UserError("the model has no trainable parameter; set requires_grad on at least one.")
    for name, p in named:
        if p.is_complex():
            raise UserError(
                f"parameter {name} is complex ({p.dtype}), and lengths and noise here are of real numbers; train "
                f"torch.view_as_real({name}), and make it complex in the forward by torch.view_as_complex."
            )
    return named


def refuse_scalars(named_parameters: Iterable[tuple[str, Any]], framework: str) -> None:
    """Raise UserError for a parameter without dimensions, which neither FSDP2 nor DeepSpeed takes."""
    for name, p in named_parameters:
        if p.ndim == 0:
            raise UserError(
                f"parameter {name} has no dimensions, which {framework} does not take; give it the shape (1,), or "
                "train without shards (backend: replicated)."
            )
