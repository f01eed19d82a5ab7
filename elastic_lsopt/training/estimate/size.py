"""The elements of a model, by what a sharding backend gathers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Elements of a model, tied ones once."""

    parameters: int
    """Trainable."""
    frozen: int = 0
    blocks: tuple[int, ...] = ()
    """Of each repeated block."""
    largest: int = 0
    """Of the largest parameter."""
    modules: tuple[int, ...] = ()
    """Of each module's own parameters, in the order in which the model lists them."""
    each: tuple[int, ...] = ()
    """Of each parameter."""
    buffers_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module, blocks: Iterable[nn.Module]) -> ModelSize:
        """Of a model wherever it is, the meta device too."""
        named = list(model.parameters())
        own = [list(module.parameters(recurse=False)) for module in model.modules()]
        return cls(
            parameters=sum(p.numel() for p in named if p.requires_grad),
            frozen=sum(p.numel() for p in named if not p.requires_grad),
            blocks=tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
            largest=max((p.numel() for p in named), default=0),
            modules=tuple(sum(p.numel() for p in mine) for mine in own if mine),
            each=tuple(p.numel() for p in named),
            buffers_bytes=sum(b.nbytes for b in model.buffers()),
        )

    @property
    def elements(self) -> int:
        return self.parameters + self.frozen

    @property
    def rest(self) -> int:
        """Of what belongs to no block: embeddings, head, last norm."""
        return self.elements - sum(self.blocks)
