"""Noise on merged weights (Flat-LoRA) in a pass without storage: all that it allocates, and no number of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_lsopt.backends.adapters.merged_weights import AdaptedLayer, Noise, adapted_layers


@dataclass
class NoiseWithoutNumbers(Noise):
    """Makes its tensors and draws nothing; the adapters that it needs are the model's own at that moment."""

    model: nn.Module = field(kw_only=True)
    layer: AdaptedLayer = field(kw_only=True)

    def _row_norms(self, weight: Tensor, wide: torch.dtype) -> Tensor:
        b, a = (self.model.get_parameter(name).detach() for name in (self.layer.b, self.layer.a))
        self.factors = b, a, self.layer.scale
        return super()._row_norms(weight, wide)

    def _add_to(self, out: Tensor, rows: Tensor) -> None:
        pass


def add_noise(model: nn.Module) -> None:
    """Let forward and backward of a model on the meta device take what noise on its adapted layers takes; in place.

    The adapters, which each rank gathers for the first forward of a step, are left out.
    """
    for layer in adapted_layers(model):
        layer.noise = NoiseWithoutNumbers(0, layer.name, 1.0, None, model=model, layer=layer)
        layer.take_place()
