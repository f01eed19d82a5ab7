"""The gradients of a loss by the logits: what is left of a pass when the model is taken away.

u_i = w_i dL_i / dF_i        of each micro-batch i, with its share w_i of the batch: J' u is the gradient
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError

NO_LOGITS = (
    "the logits need the loss in two steps; pass lso.Loss(forward, criterion, count) as loss_fn, to lso.Engine.of, "
    "lso.initialize or lso.attach."
)


@dataclass
class OutputGradients:
    """This rank's gradients by the logits, by place of the micro-batch; not weighed."""

    of: dict[int, Tensor] = field(default_factory=dict)


def pulled(by_outputs: Tensor, logits: Tensor) -> Tensor:
    """A number whose gradient by the weights is J' u, at least in fp32. Raises UserError for another shape."""
    if by_outputs.shape != logits.shape:
        raise UserError(
            f"forward of lso.Loss returned logits of shape {tuple(logits.shape)}, and {tuple(by_outputs.shape)} on the "
            "same batch a moment ago; a method that looks at logits twice needs the same shape each time."
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (by_outputs.to(wide) * logits.to(wide)).sum()
