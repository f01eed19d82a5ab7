"""Where ZeRO-3's weights are while an engine is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import elastic_lsopt as lso
from tests.cases.zero import steps


class Buffered(nn.Module):
    """Two layers and a buffer that no method moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 5)
        self.register_buffer("scale", torch.tensor(1.0 / 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x) * self.scale.to(x.dtype)))


def refused_on_meta() -> str:
    """What is said of a model without values, whose shards nobody could make."""
    with torch.device("meta"):
        model = Buffered()
    try:
        steps.start(3, model=model)
    except lso.UserError as error:
        return str(error)
    return "accepted"


def moved_whole(bf16: bool) -> dict[str, Any]:
    """How many parameters were whole when a module was moved to the device, at most; and the buffer's type."""
    seen: list[int] = []
    move = nn.Module.to

    def watched(self: nn.Module, *args: Any, **more: Any) -> nn.Module:
        seen.append(sum(p.numel() > 0 for p in self.parameters()))
        return move(self, *args, **more)

    nn.Module.to = watched  # type: ignore[method-assign]
    try:
        engine = steps.start(3, model=Buffered(), bf16=bf16, zero={"stage3_param_persistence_threshold": 0})
    finally:
        nn.Module.to = move  # type: ignore[method-assign]
    return {"whole": max(seen, default=0), "buffer": str(engine.module.scale.dtype)}
