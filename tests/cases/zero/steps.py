"""Cases on real DeepSpeed engines of every stage, each called on every rank of a live group."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.space.random.noise import block_seed, fill_normal_
from elastic_lsopt.space.vector import Vector
from tests.cases import engines
from tests.oracles import paper_loops
from tests.oracles.paper_loops import cross_entropy

STEPS = 6


def start(
    stage: int,
    method: Any = None,
    *,
    model: nn.Module | None = None,
    base: str = "momentum",
    clip: float = 0.0,
    bf16: bool = False,
    sums: str | None = None,
    zero: dict[str, Any] | None = None,
    loss_fn: Any = cross_entropy,
) -> lso.Engine:
    """An engine of that stage; `sums` is DeepSpeed's grad_accum_dtype (stage 1, bf16, fp32: its BF16_Optimizer)."""
    config: dict[str, Any] = {"zero_optimization": {"stage": stage, **(zero or {})}, "bf16": {"enabled": bf16}}
    if sums:
        config["data_types"] = {"grad_accum_dtype": sums}
    return lso.initialize(
        model=model or engines.net(), config=config, method=method, base=engines.optimizer(base), loss_fn=loss_fn,
        max_grad_norm=clip,
    )  # fmt: skip


# -- law 1 in bf16 ---------------------------------------------------------------------------------------------------


def bf16_distance(
    stage: int, method: str, sums: str | None, clip: float = 0.5, zero: dict[str, Any] | None = None
) -> float:
    """How far the engine and a loop that casts at the same places are apart after 6 steps: RMS over two models."""
    square, number = 0.0, 0
    for seed in range(2):
        steps = engines.batches(STEPS, 5, last=2, dtype=torch.bfloat16, seed=seed)
        plain = engines.net(seed=seed)
        engine = start(
            stage, lso.registry.build(method), model=copy.deepcopy(plain), clip=clip, bf16=True, sums=sums, zero=zero
        )
        assert all(t.dtype == torch.bfloat16 for t in engine.backend.working)
        for s in steps:
            engine.train_batch(engines.mine(s))
        low = copy.deepcopy(plain).bfloat16()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), low.parameters(), strict=True):
                p.copy_(q)  # DeepSpeed makes its masters from the model in bf16
        optimizer = engines.optimizer("momentum")(plain.parameters())
        for s in steps:
            for g, p in zip(casting_step(plain, low, s, method), plain.parameters(), strict=True):
                p.grad = g
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
        ours = engines.whole(engine.space)
        square += sum(float((ours[n] - p.detach()).double().square().sum()) for n, p in plain.named_parameters())
        number += sum(p.numel() for p in plain.parameters())
        engines.close(engine)
    return (square / number) ** 0.5


def casting_step(master: nn.Module, low: nn.Module, units: Any, method: str) -> list[Tensor]:
    """The gradient of `none` or `sam` (rho 0.05): weights cast from fp32 for the forward, gradients summed in fp32."""
    n = sum(len(x) for x, _ in units)

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, w in zip(low.parameters(), weights, strict=True):
                p.copy_(w)
        total = [torch.zeros_like(w) for w in weights]
        for x, y in units:
            grads = torch.autograd.grad(cross_entropy(low, (x, y)) * (len(x) / n), list(low.parameters()))
            torch._foreach_add_(total, [g.float() for g in grads])
        return total

    w = [p.detach() for p in master.parameters()]
    g = gradient(w)
    if method == "none":
        return g
    length = torch.cat([t.flatten() for t in g]).norm()
    return gradient([p + 0.05 * t / length for p, t in zip(w, g, strict=True)])


class Installs(lso.Plain):
    """Steps with a vector of its own after a pass: 10 x noise."""

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        oracle.gradient()
        return space.noise(oracle.step).vector().mul_(10.0)


def installed(stage: int, bf16: bool = False, sums: str | None = None, zero: dict[str, Any] | None = None) -> float:
    """Largest error of w - lr v clip / |v| for an installed v, relative to the step; `unused` has a part of v too."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    engine = start(
        stage, Installs(), model=engines.net(["unused"]), base="sgd", clip=0.5, bf16=bf16, sums=sums,
        zero={"sub_group_size": 50 if stage == 3 else 10**9, **(zero or {})},
    )  # fmt: skip
    space = engine.space
    wanted = engines.whole(space)
    v = [gathered(space, space.noise(k).vector().mul_(10.0)) for k in range(2)]
    for k, units in enumerate(engines.batches(2, 3, dtype=dtype)):
        engine.train_batch(engines.mine(units))
        length = torch.cat([t.flatten() for t in v[k].values()]).norm()
        wanted = {n: w - 0.1 * v[k][n] * (0.5 / length) for n, w in wanted.items()}
    ours = engines.whole(space)
    engines.close(engine)
    step = max(float((0.1 * t * (0.5 / length)).abs().max()) for t in v[1].values())
    return max(float((ours[n] - wanted[n]).abs().max()) for n in ours) / step


def groups(stage: int, zero: dict[str, Any] | None = None) -> float:
    """Law 1 with two param groups of other learning rates, one of which is changed on the way."""
    plain = engines.net()
    model = copy.deepcopy(plain)

    def base(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD([{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.02}], momentum=0.9)

    engine = lso.initialize(
        model=model, config={"zero_optimization": {"stage": stage, **(zero or {})}}, method=lso.SAM(rho=0.3), base=base,
        loss_fn=cross_entropy,
    )  # fmt: skip
    optimizer = base(plain.parameters())
    for k, units in enumerate(engines.batches(STEPS, 3)):
        for groups in (engine.param_groups, optimizer.param_groups):
            groups[1]["lr"] = 0.02 * (k + 1)
        engine.train_batch(engines.mine(units))
        paper_loops.run(plain, [units], optimizer, "sam", {"rho": 0.3})
    out = engines.furthest(engine.space, plain)
    engines.close(engine)
    return out


# -- the contract of the space ---------------------------------------------------------------------------------------


def geometry(stage: int, bf16: bool = False, zero: dict[str, Any] | None = None, garbage: float = float("nan")) -> None:
    """Norms and products of weights and gradients equal those of the whole tensors, whatever the padding holds."""
    engine = start(stage, bf16=bf16, zero=zero)
    space, dtype = engine.space, torch.bfloat16 if bf16 else torch.float32
    [units] = engines.batches(1, 3, dtype=dtype)
    engine.train_batch(engines.mine(units))
    oracle = engine.oracle(engines.mine(units))
    g = oracle.gradient()
    for slots in (engine.backend.slots, buffers(engine)):
        spoil_padding(space.layout.pieces, slots, garbage)
    w, gradient = space.weights, g.clone()
    whole_w, whole_g = engines.whole(space), gathered(space, gradient)
    names = [p.name for p in space.layout.parameters]
    flat = [torch.cat([t[n].flatten() for n in names]).double() for t in (whole_w, whole_g)]
    close = torch.testing.assert_close
    close(space.dot(w, g), float(flat[0] @ flat[1]), rtol=1e-5, atol=1e-6)
    close(space.norm(w), float(flat[0].norm()), rtol=1e-6, atol=0)
    close(space.norm(g), float(flat[1].norm()), rtol=1e-6, atol=0)
    for vector, whole in ((w, whole_w), (g, whole_g)):
        each = torch.stack([whole[n].double().norm() for n in names])
        close(space.norm_per_parameter(vector).values, each, rtol=1e-6, atol=1e-9)
        rows = [
            t.double().reshape(t.shape[0], -1) if t.dim() > 1 else t.double().reshape(1, -1)
            for t in map(whole.get, names)
        ]
        close(space.norm_per_row(vector).values, torch.cat([r.norm(dim=1) for r in rows]), rtol=1e-6, atol=1e-9)
    for p, n in zip(space.layout.parameters, names, strict=True):
        assert p.shape == tuple(whole_w[n].shape)
    engines.close(engine)


def spoil_padding(pieces: Any, slots: list[Tensor], garbage: float) -> None:
    for i, slot in enumerate(slots):
        padding = torch.ones(slot.numel(), dtype=torch.bool)
        for p in pieces:
            if p.slot == i:
                padding[p.start : p.start + p.length] = False
        slot.view(-1)[padding] = garbage


def buffers(engine: lso.Engine) -> list[Tensor]:
    """DeepSpeed's own gradient buffers, where they hold a slot in one tensor."""
    z = engine.backend.engine.optimizer
    if type(z).__name__.endswith("Stage3"):
        return list(z.grad_partitions_flat_buffer.split([s.numel() for s in engine.backend.slots]))
    return []


def gathered(space: Any, vector: Any) -> dict[str, Tensor]:
    """A vector's whole parameters on every rank; asserts that the ranks hold each element the same number of times."""
    out, times = {}, set()
    for i, p in enumerate(space.layout.parameters):
        both = torch.zeros(2, p.numel)
        for piece, t in zip(space.layout.pieces, vector.tensors, strict=True):
            if piece.parameter == i:
                both[0, piece.offset : piece.offset + piece.length] += t.float()
                both[1, piece.offset : piece.offset + piece.length] += 1
        dist.all_reduce(both)
        times |= {*both[1].tolist()}
        assert len(times) == 1, f"{p.name} is held {both[1].tolist()} times"
        out[p.name] = (both[0] / both[1]).view(p.shape)
    return out


def noise(stage: int, zero: dict[str, Any] | None = None) -> None:
    """The noise of a space is the whole parameter's, cut."""
    engine = start(stage, zero=zero)
    space = engine.space
    for piece, drawn in zip(space.layout.pieces, space.noise(3, 1).vector().tensors, strict=True):
        p = space.layout.parameters[piece.parameter]
        whole = torch.empty(p.numel)
        fill_normal_(whole, seed=block_seed(0, 3, 1), name=p.name, offset=0)
        assert torch.equal(drawn, whole[piece.offset : piece.offset + piece.length]), p.name
    engines.close(engine)


def forward_follows(stage: int, zero: dict[str, Any] | None = None, bf16: bool = False) -> list[float]:
    """Largest difference of the logits from a plain net's at the gathered weights: perturbed, nested, and back.

    Each forward runs without a backward, so that copies which wait for one would be met by the next.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    engine = start(stage, lso.SAM(), zero=zero, bf16=bf16)
    steps = engines.batches(3, 3, dtype=dtype)
    for units in steps:
        engine.train_batch(engines.mine(units))
    space, plain, apart = engine.space, engines.net(dtype=dtype), []

    def compare() -> None:
        now = gathered(space, Vector(space, engine.backend.working))
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p.copy_(now[n])
        x = steps[0][0][0]
        apart.append(float((engine.backend.forward(x) - plain(x)).abs().max()))

    compare()
    with space.perturbed(space.noise(0), 0.3):
        compare()
        with space.perturbed(space.noise(1), 0.3):
            compare()
        compare()
    compare()
    engines.close(engine)
    return apart


# -- memory ----------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def memory(
    stage: int, bf16: bool = False, sums: str | None = None, zero: dict[str, Any] | None = None
) -> dict[str, float]:
    """Bytes that SAM holds at its second forward beyond those at the step's first, as a share of this rank's master."""
    held: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        held.append(live_bytes())
        return cross_entropy(model, batch)

    model = nn.Sequential(nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
    small = {"reduce_bucket_size": 200000, "stage3_param_persistence_threshold": 0, **(zero or {})}
    engine = start(stage, lso.SAM(), model=model, bf16=bf16, sums=sums, loss_fn=loss_fn, zero=small)
    [units] = engines.batches(1, dist.get_world_size(), dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(4):
        engine.train_batch(engines.mine(units))
    shard = sum(t.nbytes for t in engine.backend.slots)
    engines.close(engine)
    return {"masters": (held[-1] - held[-2]) / shard}


def lease_is_deepspeeds(stage: int, bf16: bool = False, sums: str | None = None) -> bool:
    """The lent gradient lies in DeepSpeed's own buffers, in both passes."""
    engine = start(stage, bf16=bf16, sums=sums)
    [units] = engines.batches(1, 3, dtype=torch.bfloat16 if bf16 else torch.float32)
    z = engine.backend.engine.optimizer
    oracle, same = engine.oracle(engines.mine(units)), []
    for _ in range(2):
        g = oracle.gradient()
        if stage == 3:
            theirs = [z.grad_partitions_flat_buffer]
        elif type(z).__name__ == "BF16_Optimizer":
            theirs = z.fp32_groups_gradients_flat
        else:
            theirs = [t for ts in z.averaged_gradients.values() for t in ts]
        own = {t.untyped_storage().data_ptr() for t in theirs}
        same.append(all(t.untyped_storage().data_ptr() in own for t in g.tensors))
    engines.close(engine)
    return all(same)


# -- the engine ------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches, of which a batch whose first feature is negative uses the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(engines.FEATURES, 9)
        self.left, self.right = nn.Linear(9, engines.CLASSES), nn.Linear(9, engines.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.right if x[0, 0] < 0 else self.left)(torch.tanh(self.stem(x)))


def stale_gradient(stage: int, zero: dict[str, Any] | None = None) -> float:
    """max |dw| against a plain loop in which each step uses one branch and leaves the other where it is."""
    torch.manual_seed(0)
    plain = Branches()
    engine = start(stage, model=copy.deepcopy(plain), base="sgd", zero=zero)
    optimizer = engines.optimizer("sgd")(plain.parameters())
    for k, both in enumerate(engines.batches(4, 3)):
        units = [(x.abs() * (-1) ** k, y) for x, y in both]
        engine.train_batch(engines.mine(units))
        optimizer.zero_grad()
        for batch in units:
            (cross_entropy(plain, batch) / len(units)).backward()
        optimizer.step()
    out = engines.furthest(engine.space, plain)
    engines.close(engine)
    return out


def bookkeeping(stage: int) -> dict[str, Any]:
    """DeepSpeed's counters after 3 steps of SAM with several units, a learning rate of 0, an evaluation in between."""
    plain = engines.net()
    [units] = engines.batches(1, 5)
    engine = start(stage, lso.SAM(), model=copy.deepcopy(plain))
    evaluated = engine.evaluate([engines.mine(units)])
    with torch.no_grad():
        wanted = sum(float(cross_entropy(plain, b)) for b in units) / len(units)
    for group in engine.param_groups:
        group["lr"] = 0.0
    for _ in range(3):
        loss = engine.train_batch(engines.mine(units))
        engine.evaluate([engines.mine(units)])
    inner = engine.backend.engine
    out = {
        "evaluated": abs(evaluated - wanted) < 1e-6 and abs(loss - wanted) < 1e-6,
        "still": engines.furthest(engine.space, plain),
        "counts": [inner.global_steps, inner.micro_steps, inner.skipped_steps],
        "boundary": inner._is_gradient_accumulation_boundary,
        "momentum": len(engine.space.base_state("momentum_buffer").tensors) == len(engine.space.layout.pieces),
    }
    engines.close(engine)
    return out


def same_with_evaluation(stage: int) -> bool:
    """Evaluations between the steps change no bit of the weights."""
    runs = []
    for evaluate in (False, True):
        engine = start(stage, lso.SAM(rho=0.3), zero={"stage3_param_persistence_threshold": 12} if stage == 3 else None)
        for units in engines.batches(3, 3):
            engine.train_batch(engines.mine(units))
            if evaluate:
                engine.evaluate([engines.mine(units)[:1]])
        runs.append(engines.whole(engine.space))
        engines.close(engine)
    return all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
