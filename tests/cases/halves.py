"""SAMPa on two halves of the ranks, beside serial SAMPa and the paper's loop; what is refused, and how it fails."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.laws import DTYPES
from tests.cases.used_parameters import TwoHeads
from tests.oracles import paper_loops
from tests.oracles.paper_loops import cross_entropy

HYPER = engines.HYPERPARAMETERS["sampa"]
STEPS = 4


def pair(model: nn.Module, *, base: str = "momentum", clip: float = 0.0, **more: Any) -> tuple[lso.Engine, lso.Engine]:
    """The same model twice: in halves, and one pass after the other."""
    made = [
        engines.build("ddp", copy.deepcopy(model), lso.SAMPa(**HYPER, halves=halves), base=base, clip=clip, **more)
        for halves in (True, False)
    ]
    return made[0], made[1]


def beside(
    *, units: int, last: int | None = None, dtype: str = "fp64", extra: list[str] | None = None, clip: float = 0.0,
    base: str = "momentum",
) -> dict[str, Any]:  # fmt: skip
    """Three ways over the same steps: halves, one pass after the other, and (without dropout) the paper's loop.

    `forwards`: of this rank in the last step. `spread`: the largest difference of a weight between two ranks.
    """
    steps = engines.batches(STEPS, units, last=last, dtype=DTYPES[dtype])
    plain = engines.net(extra or (), DTYPES[dtype])
    engine, serial = pair(plain, base=base, clip=clip)
    named = [(n, p) for n, p in plain.named_parameters() if p.requires_grad]
    wanted = paper_loops.run(plain, steps, engines.optimizer(base)(named), "sampa", HYPER, clip=clip)
    forwards: list[int] = []
    engine.module.register_forward_hook(lambda *_: forwards.append(1))
    out: dict[str, Any] = {"losses": 0.0, "reports": True, "norms": 0.0}
    losses = []
    for step in steps:
        forwards.clear()
        losses.append(engine.train_batch(engines.mine(step, engine.deal)))
        loss = serial.train_batch(engines.mine(step, serial.deal))
        ours, theirs = engine.last_step, serial.last_step
        assert ours and theirs
        out["losses"] = max(out["losses"], abs(losses[-1] - loss))
        out["norms"] = max(out["norms"], abs(ours.gradient_norm - theirs.gradient_norm))
        out["reports"] &= (ours.samples, ours.passes, ours.skipped) == (theirs.samples, theirs.passes, theirs.skipped)
    out |= {"forwards": len(forwards), "dw": engines.furthest(engine.space, serial.module), "spread": spread(engine)}
    if "dropout" not in (extra or ()):
        apart = [abs(a - b) for a, b in zip(losses, wanted, strict=True)]
        out["paper"] = max(engines.furthest(engine.space, plain), *apart)
    held_out = engines.mine(steps[0])
    out["evaluated"] = abs(engine.evaluate([held_out]) - serial.evaluate([held_out]))
    return out


def spread(engine: lso.Engine) -> float:
    mine = torch.cat([t.double().reshape(-1) for t in engine.space.weights.tensors])
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return float((most - least).max())


class Decayed(TwoHeads):
    """The second head gets a gradient of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.0 if x[0, 0] > 0 else 1.0)


def two_heads(heads: Sequence[int], zeros: bool) -> dict[str, Any]:
    """Micro-batch u uses head `heads[u]` alone; the base decays what has a gradient, if of zeros, and nothing else."""
    torch.manual_seed(0)
    steps = [[(torch.randn(2, 4).double(), torch.randint(0, 3, (2,))) for _ in heads] for _ in range(3)]
    for step in steps:
        for (x, _), head in zip(step, heads, strict=True):
            x[0, 0] = 1.0 if head else -1.0
    engine, serial = pair((Decayed() if zeros else TwoHeads()).double())
    for step in steps:
        engine.train_batch(engines.mine(step, engine.deal))
        serial.train_batch(engines.mine(step, serial.deal))
    return {"dw": engines.furthest(engine.space, serial.module), "spread": spread(engine)}


def skipped_and_resumed() -> dict[str, Any]:
    """A batch that is not finite is left out alike; what serial SAMPa remembers is what halves go on from."""
    steps = engines.batches(STEPS, 3, dtype=torch.float64)
    steps[1][2][0][0, 0] = float("nan")
    engine, serial = pair(engines.net((), torch.float64))
    skips = []
    for step in steps[:3]:
        engine.train_batch(engines.mine(step, engine.deal))
        serial.train_batch(engines.mine(step, serial.deal))
        assert engine.last_step and serial.last_step
        skips.append((engine.last_step.skipped, serial.last_step.skipped))
    there = engines.net((), torch.float64)
    there.load_state_dict(serial.module.state_dict())
    again, _ = pair(there)
    again.load_state_dict(serial.state_dict())
    again.base.load_state_dict(copy.deepcopy(serial.base.state_dict()))  # type: ignore[union-attr]
    again.train_batch(engines.mine(steps[3], again.deal))
    serial.train_batch(engines.mine(steps[3], serial.deal))
    return {"skips": skips, "dw": engines.furthest(again.space, serial.module)}


def bf16() -> dict[str, Any]:
    """Weights in bf16: how far both go, and how far apart they end."""
    steps = engines.batches(STEPS, 3, dtype=torch.bfloat16)
    start = engines.net((), torch.bfloat16)
    engine, serial = pair(start)
    for step in steps:
        engine.train_batch(engines.mine(step, engine.deal))
        serial.train_batch(engines.mine(step, serial.deal))
    return {
        "dw": engines.furthest(engine.space, serial.module), "moved": engines.furthest(engine.space, start),
        "spread": spread(engine),
    }  # fmt: skip


def said(build: Callable[[], Any]) -> str:
    try:
        build()
    except lso.UserError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(kind: str) -> str:
    """What the construction says; `static`: DDP with a static graph."""
    method = lso.SAMPa(halves=True)
    if kind != "static":
        return said(lambda: engines.build(kind, engines.net(), method, base="sgd"))
    model = nn.parallel.DistributedDataParallel(engines.net(), static_graph=True)
    return said(lambda: lso.Engine.of(model, engines.optimizer("sgd")(model.parameters()), method=method,
                                      loss_fn=cross_entropy))  # fmt: skip


class Counting(nn.Module):
    """Its forward counts in a buffer, as some quantisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(engines.FEATURES, engines.CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layer(x)


def refused_in_a_step() -> dict[str, str]:
    """Batches that were dealt as without halves, plain and numbered; a forward that moves a buffer."""
    engine, _ = pair(engines.net())
    [units] = engines.batches(1, 4)
    rank = dist.get_rank()
    counting, _ = pair(Counting())
    return {
        "plain": said(lambda: engine.train_batch([units[rank]])),
        "numbered": said(lambda: engine.train_batch(engines.mine(units))),
        "misplaced": said(lambda: engine.train_batch([lso.MicroBatch(1 - engine.deal[0], units[0])])),
        "one alike": said(lambda: engine.train_batch([units[0], units[1 + rank // (dist.get_world_size() // 2)]])),
        "buffer": said(lambda: counting.train_batch(engines.mine(units, counting.deal))),
        "oracle": said(lambda: engine.oracle(engines.mine(units)).gradients_of_halves()),
    }  # fmt: skip


def one_rank_raises() -> dict[str, Any]:
    """Rank 1 in the forward of its half's pass: the others wait for it in their half, and for their twins."""
    calls = {"n": 0}

    def loss(model: Any, batch: Any) -> Tensor:
        calls["n"] += 1
        if dist.get_rank() == 1 and calls["n"] == 3:  # the first step takes two passes, in turn and in halves
            raise ValueError("oh dear")
        return cross_entropy(model, batch)

    engine, _ = pair(engines.net(), loss_fn=loss)
    steps = engines.batches(2, dist.get_world_size() // 2)
    engine.train_batch(engines.mine(steps[0], engine.deal))
    before = [t.clone() for t in engine.space.weights.tensors]
    start = time.monotonic()
    try:
        engine.train_batch(engines.mine(steps[1], engine.deal))
        return {"error": "nothing was raised"}
    except Exception as error:
        out: dict[str, Any] = {"seconds": time.monotonic() - start, "error": str(error), "kind": type(error).__name__}
    out["back"] = all(torch.equal(a, b) for a, b in zip(before, engine.space.weights.tensors, strict=True))
    return out
