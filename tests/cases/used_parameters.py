"""Micro-batches that use different parameters: two heads over one body, and each micro-batch says which it uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.errors import UserError
from tests.cases import engines
from tests.oracles import paper_loops

HYPERPARAMETERS = {"sam": {"rho": 0.05}, "looksam": {"rho": 0.05, "k": 2, "alpha": 0.7}}


class TwoHeads(nn.Module):
    """The sign of a micro-batch's first number chooses its head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x[0, 0] > 0)](torch.tanh(self.first(x)))


def distance(
    kind: str, heads: Sequence[int], method: str = "sam", then: Sequence[int] | None = None
) -> float | str:  # fmt: skip
    """How far two steps end from the paper's loop, or what was said, after which no weight may have changed.

    Micro-batch u of each step uses `heads[u]` (of the second `then[u]`); this rank's are u = rank, rank + world …
    """
    torch.manual_seed(0)
    model = TwoHeads()
    plain = copy.deepcopy(model)
    steps = [[(torch.randn(2, 4), torch.randint(0, 3, (2,))) for _ in heads] for _ in range(2)]
    for step, used in zip(steps, (heads, then or heads), strict=True):
        for (x, _), head in zip(step, used, strict=True):
            x[0, 0] = 1.0 if head else -1.0
    engine = engines.build(kind, model, lso.registry.build(method, **HYPERPARAMETERS.get(method, {})), base="sgd")
    try:
        for step in steps:
            engine.train_batch(engines.mine(step))
    except UserError as error:
        assert engines.furthest(engine.space, plain) == 0
        return str(error)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    paper_loops.run(plain, steps, optimizer, method, HYPERPARAMETERS.get(method, {}))
    return engines.furthest(engine.space, plain)
