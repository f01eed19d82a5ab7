"""Dropout replay, as cases for one engine kind each: the masks of a unit are the same in every pass and world."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.contract import dtype_of, gathered


class Checkpointed(nn.Module):
    """A block whose forward runs again in the backward pass."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x.requires_grad_() if self.reentrant else x, use_reentrant=self.reentrant)


def dropout_net(dtype: torch.dtype, checkpointing: str) -> nn.Module:
    torch.manual_seed(0)
    block: nn.Module = nn.Sequential(nn.Linear(engines.FEATURES, 13), nn.Tanh(), nn.Dropout(0.4), nn.Linear(13, 11))
    if checkpointing:
        block = Checkpointed(block, checkpointing == "reentrant")
    return nn.Sequential(block, nn.Dropout(0.2), nn.Linear(11, engines.CLASSES)).to(dtype)


def dropout(
    kind: str, checkpointing: str = "", zero: dict[str, Any] | None = None, bf16: bool = False, dtype: str = "fp64",
    method: str = "sam",
) -> dict[str, Any]:  # fmt: skip
    """Two passes of one step, then three steps of the method; losses and weights, to compare between world sizes."""
    number = dtype_of(kind, dtype, bf16)
    chosen = lso.registry.build(method, **engines.HYPERPARAMETERS[method])
    engine = engines.build(
        kind, dropout_net(number, checkpointing), chosen, zero=zero, bf16=bf16, total_samples=84
    )  # fmt: skip
    steps = engines.batches(3, 7, dtype=number)
    before = torch.get_rng_state()
    oracle = engine.oracle(engines.mine(steps[0]))
    first = oracle.gradient().clone()
    second = oracle.gradient()
    out: dict[str, Any] = {
        "passes agree": all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
        and oracle.losses[0] == oracle.losses[1],
        "loss agrees": abs(oracle.loss() - oracle.losses[0]),
        "without": engine.evaluate([engines.mine(steps[0])]),
    }
    out["losses"] = [engine.train_batch(engines.mine(s)) for s in steps]
    out["random numbers untouched"] = torch.equal(before, torch.get_rng_state())
    whole = gathered(engine.space, engine.space.weights.tensors)
    out["weights"] = [x for t in whole.values() for x in t.reshape(-1).tolist()]
    engines.close(engine)
    return out


def own_masks() -> dict[str, float]:
    """How far the loss at the same weights is from the first, asked again in the same step, and in the next step."""
    engine = engines.build("plain", dropout_net(torch.float64, ""), lso.Plain())
    own = engines.mine(engines.batches(1, 3, dtype=torch.float64)[0])
    first, again = engine.oracle(own).loss(), engine.oracle(own).loss()
    engine.clock = engine.clock.advanced(12)
    return {"again": abs(again - first), "next step": abs(engine.oracle(own).loss() - first)}
