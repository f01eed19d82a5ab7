"""Cases for `lso.initialize` on live ranks."""

from __future__ import annotations

from typing import Any

import torch

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.zero import steps
from tests.oracles.paper_loops import cross_entropy


def file_equals_arguments(path: str) -> float:
    """max |dw| after 3 steps between a run whose JSON says all and one whose arguments do."""
    runs: list[dict[str, Any]] = []
    for engine in (
        lso.initialize(model=engines.net(), config=path, loss_fn=cross_entropy),
        steps.start(2, lso.SAM(rho=0.3), clip=0.5),
    ):
        for units in engines.batches(3, 3):
            engine.train_batch(engines.mine(units))
        runs.append(engines.whole(engine.space))
        engines.close(engine)
    return max(float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0])


def mistake(what: str) -> str:
    """The message for a base, model or JSON that does not suit."""
    base: Any = engines.optimizer("sgd")
    model, config = engines.net(), {"zero_optimization": {"stage": 2}}
    match what:
        case "no_optimizer":
            base = lambda params: {"params": params}  # noqa: E731
        case "leaves_out":
            base = lambda params: torch.optim.SGD([p for p in params if p.numel() > 1], lr=0.1)  # noqa: E731
        case "needs_shapes":
            base = torch.optim.Adafactor
        case "bad_parameter":
            base, config = None, {**config, "optimizer": {"type": "SGD", "params": {"learning_rate": 1}}}
        case "nothing_to_train":
            model.requires_grad_(False)
        case "json_value":
            config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}
    try:
        lso.initialize(model=model, config=config, base=base, loss_fn=cross_entropy)
    except lso.UserError as error:
        return str(error)
    return "accepted"
