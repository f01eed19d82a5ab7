"""Cases of passes that break on DeepSpeed engines: on all ranks, on one, and by numbers that are not finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.zero.steps import start


class Broken(nn.Module):
    """A net that raises on request: in its forward, or in the backward of its middle."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.where = net, ""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.net.first(x))
        if self.where == "forward":
            raise ValueError("on purpose")
        h = self.net.second(h)
        if self.where == "backward" and h.requires_grad:
            h.register_hook(self._raise)
        return self.net.last(self.net.norm(torch.tanh(h))) * self.net.tiny

    @staticmethod
    def _raise(grad: Tensor) -> None:
        raise ValueError("on purpose")


class BreaksDisplaced(lso.SAM):
    """SAM whose second pass breaks on the ranks that `break_in` names."""

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        g = oracle.gradient()
        with space.perturbed(g, 0.3):
            model = oracle.backend.module
            model.where = model.armed
            try:
                return oracle.gradient()
            finally:
                model.where = ""


def raised(
    stage: int, where: str, ranks: list[int] | None, bf16: bool = False, zero: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Law 3: the second pass raises on these ranks (None: all); the weights are back, and a common failure goes on."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    [units] = engines.batches(1, 3, dtype=dtype)
    engine = start(stage, BreaksDisplaced(rho=0.3), model=Broken(engines.net()), bf16=bf16, zero=zero)
    engine.module.armed = ""
    engine.train_batch(engines.mine(units))
    engine.train_batch(engines.mine(units))

    def copies() -> list[Tensor]:
        whole = engine.backend._flats if stage in (1, 2) else []  # type: ignore[attr-defined]
        return [t.detach().clone() for t in (*engine.space.weights.tensors, *engine.backend.working, *whole)]

    before, error = copies(), ""
    engine.module.armed = where if ranks is None or dist.get_rank() in ranks else ""
    try:
        engine.train_batch(engines.mine(units))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    engine.module.armed = ""
    own = len(before) - (len(engine.backend.slots) if stage in (1, 2) else 0)
    now = copies()
    local = all(torch.equal(a, b) for a, b in zip(before[:own], now[:own], strict=True))
    refused = not engine.space.in_sync
    engine.space.resync()
    settled = all(torch.equal(a, b) for a, b in zip(before, copies(), strict=True))
    goes_on = ""
    try:
        for _ in range(3):
            goes_on = f"{engine.train_batch(engines.mine(units)):.4f}"
    except lso.PeerFailed as stopped:
        goes_on = type(stopped).__name__
    if not engine.backend.transport.cut:
        engines.close(engine)
    return {"error": error, "local": local, "refused": refused, "settled": settled, "goes_on": goes_on}


def non_finite(stage: int, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, Any]:
    """A step whose loss is not finite on one rank is skipped by all, and the next one is as if it had not been."""
    good, bad = engines.batches(2, 3, dtype=torch.bfloat16 if bf16 else torch.float32)
    bad[-1] = (bad[-1][0] * float("nan"), bad[-1][1])
    losses = []
    for batches in ((good, good), (good, bad, good)):
        engine = start(stage, lso.SAM(), zero=zero, bf16=bf16)
        losses.append([engine.train_batch(engines.mine(b)) for b in batches][-1])
        skipped = engine.skipped_steps
        engines.close(engine)
    return {"skipped": skipped, "same": losses[0] == losses[1]}
