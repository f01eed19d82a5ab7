"""Cases of Bi-LoRA: the length of what its adversary adds, the model without it, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.probes.catalogue import ProbeContext
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.space.vector import Vector
from tests.cases import api, engines
from tests.cases.laws import DTYPES, STEPS
from tests.oracles import paper_loops
from tests.oracles.sam_family import length_of

EXTRA = ("peft", "adversary")
R = engines.HYPERPARAMETERS["bi_lora"]["r"]


def _holding(space: Any, vector: Vector | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A plain model of the same kind that holds what the space does, or another Vector of it (collective)."""
    model = engines.net(EXTRA, dtype)
    found = engines.whole(space, vector)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found.get(name, p))
    return model


def lengths(kind: str, dtype: str = "fp32", bf16: bool = False, rho: float = 0.05) -> list[float]:
    """||s B2 A2|| of the whole products after each step."""
    engine = engines.build(
        kind, engines.net(EXTRA, DTYPES[dtype]), lso.BiLoRA(r=R, rho=rho), base="momentum", bf16=bf16
    )
    out = []
    narrow = torch.bfloat16 if bf16 and kind.startswith("zero") else DTYPES[dtype]
    for s in engines.batches(STEPS, 3, dtype=narrow):
        engine.train_batch(engines.mine(s))
        out.append(length_of(_holding(engine.space, dtype=DTYPES[dtype])))
    engines.close(engine)
    return out


def at_rest(kind: str, base: str = "momentum", clip: float = 0.0) -> dict[str, Any]:
    """rho = 0 beside LoRA of a model that has no adversary."""
    runs = []
    for extra, method in ((("peft",), lso.Plain()), (EXTRA, lso.BiLoRA(r=R, rho=0.0))):
        engine = engines.build(kind, engines.net(extra), method, base=base, clip=clip)
        losses = [engine.train_batch(engines.mine(s)) for s in engines.batches(STEPS, 3)]
        runs.append((engines.whole(engine.space), losses))
        engines.close(engine)
    (lora, wanted), (ours, losses) = runs
    up = max(float(t.abs().max()) for n, t in ours.items() if ".lora_B.adversary." in n)
    return {"dw": max(float((ours[n] - lora[n]).abs().max()) for n in lora), "dloss": losses != wanted, "up": up}


def without_it(kind: str, bf16: bool = False) -> dict[str, Any]:
    """Logits inside `averaged` and outside, beside those of plain LoRA that holds the trained adapter, or its mean."""
    engine = engines.build(
        kind, engines.net(EXTRA), lso.BiLoRA(r=R, rho=3.0), base="momentum", keep=[EMA(decay=0.5)], bf16=bf16
    )
    for s in engines.batches(STEPS, 3, dtype=torch.bfloat16 if bf16 else torch.float32):
        engine.train_batch(engines.mine(s))
    x = engines.batches(1, 1)[0][0][0]
    before = [t.clone() for t in engine.space.weights.tensors]

    def logits() -> Tensor:
        with torch.no_grad():
            return engine.backend.forward(x.bfloat16() if bf16 else x).float()

    def lora(vector: Vector | None = None) -> Tensor:
        found = engines.whole(engine.space, vector)
        model = engines.net(("peft",))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(found.get(name, p))
            return model(x)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    alone, mean = lora(), lora(engine.families["averages/ema"].state_dict()["mean"])  # type: ignore[arg-type]
    out: dict[str, Any] = {"trained": apart(logits(), alone), "name": engine.evaluates_at, "mean": apart(mean, alone)}
    with engine.averaged("bi_lora"):
        out["alone"] = apart(logits(), alone)
    with engine.averaged("ema"):
        out["ema"] = apart(logits(), mean)
    out["back"] = all(torch.equal(a, b) for a, b in zip(before, engine.space.weights.tensors, strict=True))
    engines.close(engine)
    return out


def left_out(kind: str) -> dict[str, bool]:
    """A step whose gradient is not finite changes no weight, also where the adversary is longer than rho by then."""
    engine = engines.build(kind, engines.net(EXTRA), lso.BiLoRA(r=R, rho=3.0), base="momentum")
    first, second = engines.batches(2, 3)
    engine.train_batch(engines.mine(first))
    object.__setattr__(engine.method, "rho", 1e-3)
    before = [t.clone() for t in (*engine.space.weights.tensors, *engine.space.shards.working)]
    engine.train_batch(engines.mine([(x * float("inf"), y) for x, y in second]))
    assert engine.last_step is not None
    after = [*engine.space.weights.tensors, *engine.space.shards.working]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    skipped = engine.last_step.skipped
    engine.train_batch(engines.mine(second))
    out = {"skipped": skipped, "same": same, "then": length_of(_holding(engine.space)) <= 1e-3}
    engines.close(engine)
    return out


def own_loop(kind: str, clip: float = 0.5) -> dict[str, float]:
    """LandscapeOptimizer around a user's own peft model, beside the paper's loop, fp64."""
    hyper = engines.HYPERPARAMETERS["bi_lora"]
    steps = engines.batches(STEPS, dist.get_world_size(), dtype=torch.float64)
    plain = engines.net(EXTRA, torch.float64)
    own = copy.deepcopy(plain)
    named = [(n, p) for n, p in plain.named_parameters() if p.requires_grad]
    wanted = paper_loops.run(plain, steps, engines.optimizer("momentum")(named), "bi_lora", hyper, clip=clip)
    model = api.wrapped(kind, own)
    trained = [(n, p) for n, p in api.bare(model).named_parameters() if p.requires_grad]
    optimizer = lso.LandscapeOptimizer(
        engines.optimizer("momentum")(trained), lso.BiLoRA(**hyper), max_grad_norm=clip or None
    )
    losses = [optimizer.step(api.closures(optimizer, model, api.own_units(s))) for s in steps]
    return {
        "dw": engines.furthest(optimizer.space, plain),
        "dloss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
    }


MEASURED: dict[str, dict[str, Any]] = {
    "gradient_norm": {}, "lambda_max": {}, "lpf": {"draws": 3}, "noise_scale": {}, "sam_sharpness": {},
    "trace": {"samples": 2}, "weight_norm": {},
}  # fmt: skip


def _measures(engine: lso.Engine, products: Any) -> dict[str, Any]:
    space, backend = engine.measured()
    loss = engines.SPLIT
    units = engines.batches(1, 4, seed=3)[0]
    measuring = Measurement(space, backend, loss, products=products)
    with measuring.at_rest():
        oracle = measuring.oracle(engines.mine(units), engine.clock)
        alone = [
            measuring.oracle([lso.MicroBatch(0, u, idle=dist.get_rank() > 0)], engine.clock, checked=False)
            for u in units
        ]
        context = ProbeContext(space=space, oracle=oracle, batches=lambda: alone, samples=16)
        return {name: measuring.take(name, settings, context).told for name, settings in MEASURED.items()}


def measured(kind: str, products: str = "auto") -> dict[str, Any]:
    """Measures of an engine with an adversary, where its model is, beside those of LoRA with the same adapter."""
    engine = engines.build(kind, engines.net(EXTRA), lso.BiLoRA(r=R, rho=3.0), base="momentum", loss_fn=engines.SPLIT)
    steps = engines.batches(STEPS, 3)
    for s in steps:
        engine.train_batch(engines.mine(s))
    model = engines.net(("peft",))
    found = engines.whole(engine.space)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found.get(name, p))
    with engine.averaged("bi_lora"):
        ours = _measures(engine, products)
    loss = engine.train_batch(engines.mine(steps[0]))
    engines.close(engine)
    lora = engines.build(kind, model, lso.Plain(), base="momentum", loss_fn=engines.SPLIT)
    lora.clock = SampleClock(engine.clock.samples - 12, STEPS)
    wanted = _measures(lora, products)
    engines.close(lora)
    return {"ours": ours, "wanted": wanted, "loss": loss}


# -- what is refused ---------------------------------------------------------------------------------------------------


def _refused(make: Callable[[], Any]) -> str:
    try:
        make()
    except (lso.UserError, lso.Unsupported) as error:
        return str(error)
    return "nothing"


def _adapted(**more: Any) -> nn.Module:
    import peft

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first, self.head = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(self.words(x)))

    model = Words()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["first"]), model)
    given = {"r": R, "target_modules": ["first"], **more}
    peft.inject_adapter_in_model(peft.LoraConfig(**given), model, "adversary")
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter([n for n in ("default", "adversary") if n in {*layer.lora_A, *layer.lora_embedding_A}])  # type: ignore[operator,union-attr,arg-type]
    return model


def refused() -> dict[str, str]:
    def engine(model: nn.Module, base: Any = "sgd") -> str:
        return _refused(lambda: engines.build("plain", model, lso.BiLoRA(r=R), base=base))

    def frozen() -> nn.Module:
        model = engines.net(EXTRA)
        model.first.lora_B["adversary"].requires_grad_(False)  # type: ignore[union-attr,index,operator]
        return model

    def inactive() -> nn.Module:
        model = engines.net(EXTRA)
        for layer in (model.first, model.second):
            layer.set_adapter("default")  # type: ignore[operator]
            layer.lora_A["adversary"].requires_grad_(True)  # type: ignore[union-attr,index,operator]
            layer.lora_B["adversary"].requires_grad_(True)  # type: ignore[union-attr,index,operator]
        return model

    def alone() -> nn.Module:
        model = engines.net(EXTRA)
        for layer in (model.first, model.second):
            layer.set_adapter("adversary")  # type: ignore[operator]
        return model

    schedule_free = lambda params: lso.UpdateOptimizer(params, "schedule_free", lr=0.1)  # noqa: E731
    by_numbers = [p for p in engines.net(("peft",)).parameters() if p.requires_grad]
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(by_numbers, lr=0.1), lso.BiLoRA())
    return {
        "none": engine(engines.net(("peft",))), "no adapter": engine(engines.net()), "frozen": engine(frozen()),
        "inactive": engine(inactive()), "alone": engine(alone()),
        "rank": _refused(lambda: engines.build("plain", engines.net(EXTRA), lso.BiLoRA(r=4))),
        "schedule_free": engine(engines.net(EXTRA), schedule_free),
        "embedding": engine(_adapted(target_modules=["first", "words"])),
        "whole": engine(_adapted(modules_to_save=["head"])),
        "dora": engine(_adapted(use_dora=True)),
        "bias": engine(_adapted(lora_bias=True)),
        "some": engine(_adapted()),
        "closure": _refused(lambda: optimizer.step(lambda: torch.zeros(()))),
    }  # fmt: skip
