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
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[int(x[0, 0] > 0)](torch.tanh(self.first(x)))


class InTurn(TwoHeads):
    """Both heads, in the order that the micro-batch says: autograd has their gradients in the reverse of it."""

    def forward(self, x: Tensor) -> Tensor:
        body, first = torch.tanh(self.first(x)), int(x[0, 0] > 0)
        return self.layers[first](body) * (1 + first) + self.layers[1 - first](body) * (2 - first)


def distance(
    kind: str, heads: Sequence[int], method: str = "sam", then: Sequence[int] | None = None, *, turns: bool = False,
    overlap_comm: bool = False,
) -> float | str:  # fmt: skip
    """How far two steps end from the paper's loop, or what was said, after which no weight may have changed.

    Micro-batch u of each step uses `heads[u]` (of the second `then[u]`), or with `turns` both, this one first; this
    rank's are u = rank, rank + world …
    """
    torch.manual_seed(0)
    model = InTurn() if turns else TwoHeads()
    plain = copy.deepcopy(model)
    steps = [[(torch.randn(2, 4), torch.randint(0, 3, (2,))) for _ in heads] for _ in range(2)]
    for step, used in zip(steps, (heads, then or heads), strict=True):
        for (x, _), head in zip(step, used, strict=True):
            x[0, 0] = 1.0 if head else -1.0
    method_of_job = lso.registry.build(method, **HYPERPARAMETERS.get(method, {}))
    engine = engines.build(kind, model, method_of_job, base="sgd", zero={"overlap_comm": overlap_comm})
    try:
        for step in steps:
            engine.train_batch(engines.mine(step))
    except UserError as error:
        assert engines.furthest(engine.space, plain) == 0
        return str(error)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    paper_loops.run(plain, steps, optimizer, method, HYPERPARAMETERS.get(method, {}))
    return engines.furthest(engine.space, plain)
