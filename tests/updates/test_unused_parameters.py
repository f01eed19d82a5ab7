"""A parameter that no pass gave a gradient stays as it is under an update, as under torch: weights, counts, moments.

DeepSpeed gives it zeros, by which it decays, and an update does there what DeepSpeed does.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from tests.cases import updates
from tests.cases.used_parameters import TwoHeads
from tests.laws.cover import full_but

TORCHS = sorted(kind.__name__ for kind in ELEMENT_WISE)
OURS = sorted(set(updates.UPDATES) - {"adahessian", "sophia_g", "sophia_h", "sassha", "soap_none", "soap_short"})
USED = [0, 0, 1, 0, 1, 1, 0]
"""Of which head each step is; the last head is used by none."""
DECAY: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, "AdamW": {"weight_decay": 0.1}, "Adam": {},
}  # fmt: skip


def base_of(update: str, params: Any) -> lso.UpdateOptimizer:
    if update in updates.UPDATES:
        return updates.ours(update)(params)
    return lso.UpdateOptimizer(params, update, lr=0.01, **DECAY.get(update, {}))


def theirs(update: str, module: nn.Module) -> torch.optim.Optimizer:
    if update in updates.UPDATES:
        return updates.theirs(update, module)
    return getattr(torch.optim, update)(module.parameters(), lr=0.01, **DECAY.get(update, {}))


@pytest.mark.parametrize(
    "update,resumed",
    full_but(
        [*((u, False) for u in (*OURS, *TORCHS)), ("AdamW", True), ("SGD", True), ("soap", True)],
        [*OURS, *TORCHS],
        [False, True],
    ),
)
def test_each_steps_when_it_is_used(update: str, resumed: bool) -> None:
    """Equal to an optimizer of its own for each head, which steps when the head is used."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "never": nn.Linear(4, 3)}
    )
    model, x = model.double(), torch.randn(5, 4).double()
    plain = copy.deepcopy(model)

    def loss_of(net: Any, head: int) -> torch.Tensor:
        return (net["ab"[head]](torch.tanh(net["body"](x))) - 1).square().mean()

    optimizer = lso.LandscapeOptimizer(base_of(update, model.parameters()), lso.Plain())
    own = {name: theirs(update, plain[name]) for name in ("body", "a", "b")}
    for i, head in enumerate(USED):
        if resumed and i == 4:
            state = optimizer.state_dict()
            optimizer = lso.LandscapeOptimizer(base_of(update, model.parameters()), lso.Plain())
            model.zero_grad()
            optimizer.load_state_dict(state)

        def closure(head: int = head, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, head)
            loss.backward()
            return loss

        optimizer.step(closure)
        plain.zero_grad()
        loss_of(plain, head).backward()
        own["body"].step()
        own["ab"[head]].step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        furthest = float((p - q).detach().abs().max())
        assert furthest == 0 if name.startswith("never") else furthest < (1e-6 if "soap" in update else 1e-12), name


@pytest.mark.parametrize(
    "kind,update",
    full_but(
        [("ddp", "lamb"), ("fsdp2", "soap"), ("fsdp2", "AdamW")], ["ddp", "fsdp2"], ["lamb", "soap", "muon", "AdamW"]
    ),
)
def test_so_on_several_ranks(ranks: Any, kind: str, update: str) -> None:
    for furthest, moved in ranks(2).run("tests.updates.test_unused_parameters:alternating", kind=kind, update=update):
        assert furthest < (1e-6 if update in ("soap", "muon") else 1e-12) and moved > 1e-3


def alternating(kind: str, update: str) -> tuple[float, float]:
    """How far this rank's weights end from the loop over whole parameters, and how far those of the heads moved."""
    from tests.cases import engines
    from tests.oracles import paper_loops

    torch.manual_seed(0)
    model = TwoHeads().double()
    plain = copy.deepcopy(model)
    began = [p.detach().clone() for p in plain.layers.parameters()]
    steps = [[(torch.randn(2, 4).double(), torch.randint(0, 3, (2,))) for _ in range(2)] for _ in USED]
    for step, head in zip(steps, USED, strict=True):
        for x, _ in step:
            x[0, 0] = 1.0 if head else -1.0
    loop = theirs(update, plain)
    engine = engines.build(kind, model, lso.Plain(), base=lambda given: base_of(update, [_tensor(p) for p in given]))
    for step in steps:
        engine.train_batch(engines.mine(step))
    paper_loops.run(plain, steps, loop, "none", {})
    moved = min(float((p - q).detach().abs().max()) for p, q in zip(plain.layers.parameters(), began, strict=True))
    return engines.furthest(engine.space, plain), moved


def _tensor(given: Any) -> Any:
    return given[1] if isinstance(given, tuple) else given
