"""Update rules of ours and averages, on every way to lay the weights out, against loops over whole parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import schedulefree
import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.updates.adaptive_memory import AdaptiveMemory
from elastic_lsopt.updates.lamb import LAMB as LAMB_RULE
from elastic_lsopt.updates.muon import Muon
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer
from tests.cases import engines
from tests.cases.laws import DTYPES, STEPS
from tests.oracles import paper_loops, updates
from tests.oracles.curvature import SASSHA, AdaHessian, SophiaG, SophiaH

LARS = {"lr": 0.5, "momentum": 0.9, "trust": 0.1, "weight_decay": 1e-3}
LAMB = {"lr": 0.02, "weight_decay": 0.01, "eps": 1e-6, "most": 1.0, "vectors": True}
MUON, ADAMW = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.01}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lars": ("lars", LARS), "lamb": ("lamb", LAMB),
    "adaptive_memory_sgd": ("adaptive_memory", {"form": "sgd", "lr": 0.05, "weight_decay": 1e-3}),
    "adaptive_memory_adamw": ("adaptive_memory", {"form": "adamw", "lr": 0.01, "weight_decay": 0.01}),
    "soap": ("soap", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}),
    "soap_often": ("soap", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3, "every": 2}),
    "soap_short": ("soap", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3, "most": 7}),
    "soap_none": ("soap", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3, "most": 0}),
    "adahessian": ("adahessian", {"lr": 0.03, "weight_decay": 0.01, "eps": 0.01}),
    "sophia_h": ("sophia_h", {"lr": 0.01, "weight_decay": 0.1, "gamma": 0.5, "every": 2, "betas": (0.9, 0.5)}),
    "sophia_g": ("sophia_g", {"lr": 0.01, "weight_decay": 0.1, "rho": 0.5, "every": 2, "betas": (0.9, 0.5)}),
    "sassha": ("sassha", {"lr": 0.03, "weight_decay": 0.01, "eps": 0.1, "every": 4}),
    "schedule_free_sgd": ("schedule_free", {"form": "sgd", "lr": 0.3, "weight_decay": 1e-3}),
    "schedule_free_adamw": ("schedule_free", {"form": "adamw", "lr": 0.01, "weight_decay": 0.01, "eps": 1e-6}),
}  # fmt: skip
"""The registered name and the options of each update that serves all parameters alike."""
UPDATES = (*OPTIONS, "muon")


def is_matrix(p: Any) -> bool:
    return len(getattr(p, "ds_shape", p.shape)) == 2


def ours(update: str) -> Callable[[Any], UpdateOptimizer]:
    """The base optimizer from parameters, or from (name, parameter) pairs; "…-undecayed": without weight decay."""
    update, _, undecayed = update.partition("-")

    def make(given: Any) -> UpdateOptimizer:
        params = [x[1] if isinstance(x, tuple) else x for x in given]
        if update == "muon":
            matrices, rest = [p for p in params if is_matrix(p)], [p for p in params if not is_matrix(p)]
            groups = [{"params": matrices, "update": Muon(), **MUON}, {"params": rest, "update": "AdamW", **ADAMW}]
            return UpdateOptimizer(groups, lr=0.0)
        name, options = OPTIONS[update]
        return UpdateOptimizer(params, name, **options | ({"weight_decay": 0.0} if undecayed else {}))

    return make


def theirs(update: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if update == "lars":
        return updates.LARS(params, **LARS)
    if update == "lamb":
        return updates.LAMB(params, **LAMB)
    if update in OPTIONS:
        return _authors(update, params, dict(OPTIONS[update][1]))
    matrices = torch.optim.Muon([p for p in params if is_matrix(p)], **MUON)
    return updates.Both(matrices, torch.optim.AdamW([p for p in params if not is_matrix(p)], **ADAMW))


def _authors(update: str, params: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    """The authors' own code where there is a package, else the paper's loop."""
    form = options.pop("form", None)
    if update.startswith("schedule_free"):
        authors = schedulefree.SGDScheduleFree if form == "sgd" else schedulefree.AdamWScheduleFree
        made = authors(params, **options)
        made.train()
        return made
    if update.startswith("soap"):
        return updates.SOAP(params, **options)
    kinds = {"sophia_g": SophiaG, "sophia_h": SophiaH, "adahessian": AdaHessian, "sassha": SASSHA}
    return kinds[update](params, **options) if update in kinds else updates.AdaptiveMemory(params, str(form), **options)


def sampling_loss() -> lso.Loss:
    """The cross-entropy of the plain loop, as a loss that can draw labels."""
    return lso.Loss(
        lambda model, batch: model(batch[0]),
        lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch[1]),
        lambda batch: len(batch[0]),
        sample=lambda logits, batch: (batch[0], torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]),
    )


def reference(
    kind: str, update: str, *, method: str = "none", dtype: str = "fp32", clip: float = 0.0, units: int = 3,
    last: int | None = None, bf16: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Law 1, and law 7: max |dw| after 6 steps from the loop over whole parameters; bytes held over the shard's."""
    hyper = engines.HYPERPARAMETERS[method]
    steps = engines.batches(STEPS, units, last=last, dtype=DTYPES[dtype])
    plain = engines.net((), DTYPES[dtype])
    model = copy.deepcopy(plain)
    total = sum(len(x) for s in steps for x, _ in s)
    wanted = paper_loops.run(plain, steps, theirs(update, plain), method, hyper, clip=clip)
    engine = engines.build(
        kind,
        model,
        lso.registry.build(method, **hyper),
        base=ours(update),
        clip=clip,
        total_samples=total,
        bf16=bf16,
        loss_fn=sampling_loss() if update == "sophia_g" else paper_loops.cross_entropy,
    )
    losses = [engine.train_batch(engines.mine(s)) for s in steps]
    vectors = [v for f in engine.families.values() for v in f.state_dict().values() if not isinstance(v, int | float)]
    own = sum(v.local_bytes for v in vectors)
    out = {
        "dw": engines.furthest(engine.space, plain),
        "dloss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "passes": engine.last_step.passes if engine.last_step is not None else 0,
        "vectors": own / (engine.space.weights.local_bytes or 1),
    }  # fmt: skip
    engines.close(engine)
    return out


def counted(kind: str) -> dict[str, int]:
    """How often a step calls `all_reduce`: with AdamW as base, with an EMA beside it, with each update that does not
    look at the curvature."""
    calls, reduce = 0, dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3)

    out = {}
    for name, base, keep in (
        ("adamw", adamw, []), ("ema", adamw, [EMA(decay=0.9)]),
        *((name, ours(name), []) for name in OPTIONS if name not in ("sophia_g", "sophia_h", "adahessian", "sassha")),
    ):  # fmt: skip
        engine = engines.build(kind, engines.net(), lso.Plain(), base=base, clip=0.5, keep=keep)
        first, second = engines.batches(2, 4)
        engine.train_batch(engines.mine(first))
        with patch.object(dist, "all_reduce", counting):
            calls = 0
            engine.train_batch(engines.mine(second))
        out[name] = calls
        engines.close(engine)
    return out


def rested(kind: str, update: str) -> dict[str, float]:
    """Law 2: max |dw| from what the update is at its rest point, after 6 steps in fp64.

    LARS and LAMB rest where parameters are vectors (all others take the known step itself), Muon without an iteration,
    adaptive memory without memory.
    """
    sgd, adamw = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, {**ADAMW, "eps": 1e-6}

    def at_rest(given: Any) -> UpdateOptimizer:
        params = [x[1] if isinstance(x, tuple) else x for x in given]
        matrices, vectors = [p for p in params if is_matrix(p)], [p for p in params if not is_matrix(p)]
        rules: dict[str, tuple[Any, Any, dict[str, Any]]] = {
            "lars": ("SGD", "lars", sgd), "lamb": ("AdamW", LAMB_RULE(vectors=False), adamw),
            "muon": (Muon(iterations=0, momentum=0.0, nesterov=False), "SGD", {"lr": 0.05, "weight_decay": 0.0}),
            "adaptive_memory_sgd": (
                AdaptiveMemory(form="sgd", lam=0.0, most=0.0), "SGD", {"lr": 0.05, "weight_decay": 1e-3},
            ),
        }  # fmt: skip
        of_matrices, of_vectors, options = rules[update]
        groups = [{"params": matrices, "update": of_matrices}, {"params": vectors, "update": of_vectors}]
        return UpdateOptimizer([group | options for group in groups], lr=0.0)

    steps, plain = engines.batches(STEPS, 5, dtype=torch.float64), engines.net((), torch.float64)
    engine = engines.build(kind, copy.deepcopy(plain), lso.Plain(), base=at_rest)
    known = {
        "lars": lambda ps: torch.optim.SGD(ps, **sgd), "lamb": lambda ps: torch.optim.AdamW(ps, **adamw),
        "muon": lambda ps: updates.Normalised(ps, lr=0.05),
        "adaptive_memory_sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, weight_decay=1e-3),
    }  # fmt: skip
    paper_loops.run(plain, steps, known[update](list(plain.parameters())), "none", {})
    for s in steps:
        engine.train_batch(engines.mine(s))
    out = {"dw": engines.furthest(engine.space, plain)}
    engines.close(engine)
    return out


def followed(kind: str, decay: float, dtype: str = "fp64") -> dict[str, float]:
    """The mean of the weights that a second model keeps, and the loss there and after; batches of two sizes."""
    world, number = dist.get_world_size(), DTYPES[dtype]
    steps = engines.batches(4, world + 1, dtype=number) + engines.batches(2, 2 * world, dtype=number)
    engine = engines.build(kind, engines.net((), number), lso.Plain(), keep=[EMA(decay=decay)])
    points = [engines.whole(engine.space)]
    points[0] = {n: t.clone() for n, t in points[0].items()}
    for step in steps:
        engine.train_batch(engines.mine(step))
        points.append({n: t.clone() for n, t in engines.whole(engine.space).items()})
    sizes = [sum(len(x) for x, _ in step) for step in steps]
    wanted = {n: updates.ema([p[n] for p in points], sizes, decay) for n in points[0]}
    held = [engines.mine(steps[0])]
    before = engine.evaluate(held)
    mean: Any = engine.families["averages/ema"].state_dict()["mean"]
    found = engines.whole(engine.space, mean)
    with engine.averaged("ema"):
        inside = engine.evaluate(held)
    there = engines.net((), torch.float64)
    with torch.no_grad():
        for n, p in there.named_parameters():
            p.copy_(wanted[n])
    samples = sum(len(x) for x, _ in steps[0])
    loss = sum(float(paper_loops.cross_entropy(there, (x.double(), y))) * len(x) for x, y in steps[0]) / samples
    out = {
        "loss": abs(inside - loss), "back": abs(engine.evaluate(held) - before), "moved": abs(inside - before),
        "mean": max(float((found[n] - wanted[n]).abs().max()) for n in found),
        "bytes": mean.local_bytes / engine.space.weights.local_bytes if engine.space.layout.pieces else 1.0,
    }  # fmt: skip
    engines.close(engine)
    return out


def at_its_point(kind: str) -> dict[str, float]:
    """Schedule-free SGD: x on shards against the authors' eval mode, and the loss there and after."""
    steps = engines.batches(STEPS, 3)
    plain = engines.net()
    model = copy.deepcopy(plain)
    authors: Any = theirs("schedule_free_sgd", plain)
    paper_loops.run(plain, steps, authors, "none", {})
    engine = engines.build(kind, model, lso.Plain(), base=ours("schedule_free_sgd"))
    for s in steps:
        engine.train_batch(engines.mine(s))
    held = [engines.mine(steps[0])]
    before = engine.evaluate(held)
    authors.eval()
    with engine.averaged("schedule_free"):
        inside = engine.evaluate(held)
    found = engines.whole(engine.space, engine.average("schedule_free"))
    wanted = dict(plain.named_parameters())
    samples = sum(len(x) for x, _ in steps[0])
    with torch.no_grad():
        loss = sum(float(paper_loops.cross_entropy(plain, b)) * len(b[0]) for b in steps[0]) / samples
    out = {
        "x": max(float((found[n].double() - wanted[n].detach().double()).abs().max()) for n in found),
        "loss": abs(inside - loss), "back": abs(engine.evaluate(held) - before), "moved": abs(inside - before),
    }  # fmt: skip
    engines.close(engine)
    return out


def block_means(kind: str) -> dict[str, float]:
    """Means over rows that ranks cut against those of whole parameters; sums over ranks for blocks, and for none."""
    engine = engines.build(kind, engines.net(), lso.Plain())
    space = engine.space
    v = space.noise(0).vector()
    whole = engines.whole(space, v)
    lengths = [p.row_length if len(p.shape) > 1 else 1 for p in space.layout.parameters]
    sums, reduce = [], space.shards.sum_pieces_
    with patch.object(space.shards, "sum_pieces_", lambda values: sums.append(1) or reduce(values)):
        space.mean_over_blocks_(v, [1] * len(lengths))
        none = len(sums)
        space.mean_over_blocks_(v, lengths)
    found = engines.whole(space, v)
    wanted = {n: t.mean(1, keepdim=True).expand(t.shape) if t.dim() > 1 else t for n, t in whole.items()}
    out = {
        "off": max(float((found[n] - wanted[n]).abs().max()) for n in found), "sums": float(len(sums) - none),
        "none": float(none),
    }  # fmt: skip
    engines.close(engine)
    return out


def soap_memory(kind: str) -> dict[str, int]:
    """Numbers that this rank keeps of matrices that it owns, and of vectors."""
    engine = engines.build(kind, engines.net(), lso.Plain(), base=ours("soap"))
    engine.train_batch(engines.mine(engines.batches(1, 3)[0]))
    state: Any = {k: v for k, v in engine.families["update/soap"].state_dict().items() if hasattr(v, "tensors")}
    numbers = {key: sum(t.numel() for t in v.tensors) for key, v in state.items()}
    plain = sum(n for key, n in numbers.items() if key.startswith("plain"))
    engines.close(engine)
    return {"owned": sum(numbers.values()) - plain, "plain": plain}
