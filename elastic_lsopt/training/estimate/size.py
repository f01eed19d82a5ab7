"""The elements of a model, by what a sharding backend gathers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from elastic_lsopt.updates.soap import SOAP


@dataclass(frozen=True)
class Count:
    """Elements of some of a model's parameters."""

    trained: int = 0
    frozen: int = 0

    @property
    def elements(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> Count:
        sizes = [(p.numel(), p.requires_grad) for p in parameters]
        return cls(sum(n for n, trained in sizes if trained), sum(n for n, trained in sizes if not trained))


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Elements of a model, tied ones once."""

    parameters: int
    """Trainable."""
    frozen: int = 0
    blocks: tuple[Count, ...] = ()
    """Of each repeated block."""
    largest: int = 0
    """Of the largest trainable parameter."""
    looked_up: int = 0
    """Of frozen embeddings: no gradient goes back through them, so a backward does not need them."""
    modules: tuple[int, ...] = ()
    """Of each module's own parameters, in the order in which the model lists them."""
    each: tuple[int, ...] = ()
    """Of each parameter."""
    grams: int = 0
    """Of a square matrix for each side, up to SOAP's longest, of each trainable parameter that has several."""
    buffers_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module, blocks: Iterable[nn.Module]) -> ModelSize:
        """Of a model wherever it is, the meta device too."""
        named = list(model.parameters())
        own = [list(module.parameters(recurse=False)) for module in model.modules()]
        whole = Count.of(named)
        return cls(
            parameters=whole.trained,
            frozen=whole.frozen,
            blocks=tuple(Count.of(block.parameters()) for block in blocks),
            largest=max((p.numel() for p in named if p.requires_grad), default=0),
            looked_up=_looked_up(model),
            modules=tuple(sum(p.numel() for p in mine) for mine in own if mine),
            each=tuple(p.numel() for p in named),
            grams=sum(n * n for p in named if p.requires_grad and p.dim() > 1 for n in p.shape if n <= SOAP.most),
            buffers_bytes=sum(b.nbytes for b in model.buffers()),
        )

    @property
    def whole(self) -> Count:
        return Count(self.parameters, self.frozen)

    @property
    def elements(self) -> int:
        return self.parameters + self.frozen

    @property
    def rest(self) -> Count:
        """Of what belongs to no block: embeddings, head, last norm."""
        return Count(
            self.parameters - sum(block.trained for block in self.blocks),
            self.frozen - sum(block.frozen for block in self.blocks),
        )


def _looked_up(model: nn.Module) -> int:
    homes: dict[int, set[bool]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            homes.setdefault(id(p), set()).add(isinstance(module, nn.Embedding) and not p.requires_grad)
    return sum(p.numel() for p in model.parameters() if homes[id(p)] == {True})
