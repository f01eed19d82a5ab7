"""Products with the curvature on one engine kind each, against whole fp64 matrices built by brute force."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import elastic_lsopt as lso
from elastic_lsopt.oracle.losses.loss import classification_loss
from elastic_lsopt.oracle.replay.slot import replayed
from elastic_lsopt.space.random.noise import block_seed
from tests.cases import engines
from tests.cases.contract import dtype_of, gathered, plain_values, vector_of

EXACT = ("kept", "rebuilt", "blockwise")


def split_loss() -> lso.Loss:
    """Cross-entropy over all that is classified: (…, classes)."""
    return lso.Loss(
        forward=lambda model, batch: model(batch[0]),
        criterion=lambda logits, batch: nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten()),
        count=lambda batch: float(batch[1].numel()),
    )


def model_and_units(model: str, extra: Sequence[str], dtype: torch.dtype, units: int) -> tuple[nn.Module, list[Any]]:
    if model == "transformer":
        return engines.transformer(extra, dtype), engines.token_batches(units, last=1)
    return engines.net(extra, dtype), engines.batches(1, units, last=2, dtype=dtype)[0]


def products(
    kind: str,
    model: str = "net",
    extra: Sequence[str] = (),
    modes: Sequence[str] = EXACT,
    dtype: str = "fp32",
    units: int = 5,
    zero: dict[str, Any] | None = None,
    bf16: bool = False,
    perturbed: bool = False,
) -> dict[str, float]:
    """Relative distance of H v and G v from the matrices of the plain model, by mode; `symmetry` is u'Hv - v'Hu."""
    module, own = model_and_units(model, extra, dtype_of(kind, dtype, bf16), units)
    plain = copy.deepcopy(module).double()
    wide = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in own]
    engine = engines.build(kind, module, lso.Plain(), zero=zero, bf16=bf16, loss_fn=split_loss())
    out: dict[str, float] = {}
    names = [n for n, p in plain.named_parameters() if p.requires_grad]
    directions = [
        {n: plain_values(p.shape, n, k).to(engines.DEVICE) for n, p in plain.named_parameters() if p.requires_grad}
        for k in (1, 2)
    ]
    if perturbed:
        with torch.no_grad():
            for n, p in plain.named_parameters():
                if p.requires_grad:
                    p.add_(directions[1][n].double(), alpha=0.05)
    v64 = torch.cat([directions[0][n].double().reshape(-1) for n in names])
    Hv, Gv = plain_products(plain, wide, v64, engine.space.seed, "dropout" in extra)
    for mode in modes:
        space, oracle = lso.attach(engine, None, engines.mine(own), products=mode, checked=False)  # type: ignore[arg-type]
        u, v = vector_of(space, directions[1]), vector_of(space, directions[0])
        if perturbed:
            with space.perturbed(u, 0.05):
                out |= _distances(space, oracle, mode, names, u, v, Hv, Gv)
        else:
            out |= _distances(space, oracle, mode, names, u, v, Hv, Gv)
        oracle.products.close()
    engines.close(engine)
    return out


def _distances(
    space: Any, oracle: Any, mode: str, names: list[str], u: Any, v: Any, Hv: Tensor, Gv: Tensor
) -> dict[str, float]:
    def apart(ours: Any, wanted: Tensor) -> float:
        whole = gathered(space, ours.tensors)
        flat = torch.cat([whole[n].reshape(-1) for n in names])
        return float((flat - wanted.cpu()).norm() / wanted.norm())

    hv = oracle.hvp(v)
    out = {f"{mode} H": apart(hv, Hv), f"{mode} H again": apart(oracle.hvp(v), Hv)}
    asymmetry = space.dot(u, hv) - space.dot(v, oracle.hvp(u))
    out[f"{mode} symmetry"] = abs(asymmetry) / (space.norm(u) * space.norm(hv))
    if mode != "differences":
        out[f"{mode} G"] = apart(oracle.ggn_vp(v), Gv)
    return out


def plain_products(
    plain: nn.Module, units: Sequence[Any], v: Tensor, seed: int, dropout: bool
) -> tuple[Tensor, Tensor]:
    """H v and G v of the mean loss over all units, in fp64: G by the whole Jacobian and each thing's own matrix; H by a
    double backward, which `test_the_reference` compares with the whole Hessian.
    """
    parameters = [p for p in plain.parameters() if p.requires_grad]
    total = sum(batch[1].numel() for batch in units)
    Hv, Gv = torch.zeros_like(v), torch.zeros_like(v)
    for index, (x, y) in enumerate(units):
        seeded = replayed(block_seed(seed, "dropout", 0, index), engines.DEVICE)
        with seeded, sdpa_kernel(SDPBackend.MATH):
            z = plain(x).flatten(0, -2)
        loss = nn.functional.cross_entropy(z, y.flatten(), reduction="sum") / total
        g = flat_gradient(loss, parameters, create_graph=True)
        Hv += flat_gradient(g @ v, parameters, retain_graph=True)
        J = torch.stack([flat_gradient(zi, parameters, retain_graph=True) for zi in z.reshape(-1)])
        p = z.detach().softmax(-1)
        for row, own in zip(J.view(*z.shape, len(v)), p, strict=True):  # a classified thing each: (classes, n)
            Gv += row.T @ ((torch.diag(own) - torch.outer(own, own)) @ (row @ v)) / total
    return Hv, Gv


def flat_gradient(y: Tensor, parameters: Sequence[Tensor], **options: Any) -> Tensor:
    if not y.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=y.device)
    grads = torch.autograd.grad(y, parameters, allow_unused=True, **options)
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


class ConstantTanh(torch.autograd.Function):
    """tanh, right at first order; its backward pass is a constant to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        with torch.no_grad():
            return g * (1 - torch.tanh(x.detach()) ** 2)


def refusals(kind: str, what: str) -> dict[str, Any]:
    """What a wrong use of products says, on this rank."""
    poison = {"calls": 0}

    class Once(ConstantTanh):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            [x] = ctx.saved_tensors
            return g * (1 - torch.tanh(x) ** 2)

    def loss(model: Any, batch: Any) -> Tensor:
        out = model(batch[0])
        match what:
            case "random":
                poison["calls"] += 1
                out = out * (1 + 0.1 * poison["calls"])
            case "sum":
                return nn.functional.cross_entropy(out, batch[1], reduction="sum")
            case "nan":
                return nn.functional.cross_entropy(out, batch[1]) * float("nan")
            case "constant" | "constant by name":
                out = ConstantTanh.apply(out)
            case "once":
                out = Once.apply(out)
        return nn.functional.cross_entropy(out, batch[1])

    engine = engines.build(kind, engines.net(), lso.Plain(), loss_fn=loss)
    [units] = engines.batches(1, 3)
    mode: Any = {"unknown": "fast", "constant by name": "kept"}.get(what, "auto")
    hook = engine.module.first.register_forward_hook(lambda m, i, o: o * 2) if what == "hook" else None  # type: ignore[union-attr]
    try:
        space, oracle = lso.attach(engine, None, engines.mine(units), products=mode)
        v = space.noise(0).vector()
        product = oracle.ggn_vp(v) if what == "not split" else oracle.hvp(v)
        said = f"{oracle.products.chosen}, error {product.relative_error}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if hook is not None:
        hook.remove()
    engines.close(engine)
    return {"said": said}


def found_by_a_hostile_reader(kind: str) -> dict[str, Any]:
    """Uses that once gave wrong numbers without a word, or destroyed what was the caller's."""
    out: dict[str, Any] = {}
    [units] = engines.batches(1, 4)

    def attach(model: nn.Module, loss: Any, mode: Any = "auto", **more: Any) -> Any:
        return lso.attach(model, loss, units, products=mode, **more)

    def plain_loss(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def summed(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def said(act: Callable[[], Any]) -> str:
        try:
            act()
            return "nothing"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    space, oracle = attach(engines.net(), summed)
    v = space.noise(0).vector()
    out["refused each time"] = [said(lambda: oracle.hvp(v))[:40] for _ in range(2)]

    model = engines.net(("dropout",))
    space, oracle = attach(model, plain_loss, "kept", checked=False)
    v = space.noise(0).vector()

    def fresh() -> float:
        _, other = attach(model, plain_loss, "rebuilt", checked=False)
        return space.norm(oracle.hvp(v) - other.hvp(v)) / space.norm(other.hvp(v))

    out["at first"] = fresh()
    for p in model.parameters():
        p.data.mul_(1.2)
    out["after .data"] = fresh()
    model.eval()
    out["after eval()"] = fresh()
    oracle.gradient()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    out["after a fused step"] = fresh()

    space, oracle = attach(engines.net(), plain_loss)
    g = oracle.gradient()
    out["H g with a lease"] = said(lambda: oracle.hvp(g))

    class HeadByWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(engines.FEATURES, 9), nn.Linear(9, engines.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias)

    space, oracle = attach(HeadByWeight(), plain_loss, "blockwise", checked=False)
    out["a weight read elsewhere"] = said(lambda: oracle.hvp(space.noise(0).vector()))

    head = nn.Linear(engines.FEATURES, engines.CLASSES)
    head.weight.requires_grad_(False)
    one = [{"x": units[0][0][:1], "labels": units[0][1][:1]}]
    space, oracle = lso.attach(head, classification_loss(), one, checked=False)
    v = space.noise(0).vector()
    before = v.clone()
    oracle.ggn_vp(v)
    out["v is the caller's"] = space.norm(v - before)
    return out


def unequal_units_blockwise() -> dict[str, float]:
    """A plan for unequal ranks under DDP: [0, 1, 2] and [3]."""
    [units] = engines.batches(1, 4)
    own = [units[:3], units[3:]][dist.get_rank()]
    first = [0, 3][dist.get_rank()]
    model = nn.parallel.DistributedDataParallel(engines.net())
    out = {}
    for mode in ("kept", "blockwise"):
        given = [lso.MicroBatch(first + i, u) for i, u in enumerate(own)]
        space, oracle = lso.attach(model, split_loss(), given, products=mode, checked=False)  # type: ignore[arg-type]
        out[mode] = space.norm(oracle.hvp(space.noise(0).vector()))
    return out


def follows_the_weights(kind: str) -> dict[str, float]:
    """A kept graph is built again after a step and inside a perturbation, and the weights come back bit for bit."""
    engine = engines.build(kind, engines.net(), lso.Plain(), base="sgd", loss_fn=split_loss())
    own = engines.mine(engines.batches(1, 4)[0])
    space, oracle = lso.attach(engine, None, own, products="kept", checked=False)
    v = space.noise(0).vector()
    before = oracle.hvp(v)
    weights = [t.clone() for t in space.weights.tensors]
    with space.perturbed(v, 0.1):
        perturbed = oracle.hvp(v)
    again = oracle.hvp(v)
    same = all(torch.equal(a, b) for a, b in zip(weights, space.weights.tensors, strict=True))
    engine.train_batch(own)
    stepped = oracle.hvp(v)
    _, fresh = lso.attach(engine, None, own, products="rebuilt", checked=False)
    out = {
        "came back": float(same), "again": space.norm(again - before), "perturbed": space.norm(perturbed - before),
        "stepped": space.norm(stepped - before), "stepped, apart": space.norm(stepped - fresh.hvp(v)),
        "size": space.norm(before),
    }  # fmt: skip
    engines.close(engine)
    return out


def bytes_blockwise(world_of_blocks: int = 8) -> dict[str, float]:
    """Gathered bytes that are alive at once while a blockwise product runs, as shares of the model's."""
    torch.manual_seed(0)
    width = 64
    model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(world_of_blocks)])
    model.append(nn.Linear(width, engines.CLASSES))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = (torch.randn(2, width), torch.randint(0, engines.CLASSES, (2,)))
    rank = dist.get_rank()
    out = {}
    for mode in ("blockwise", "rebuilt"):
        space, oracle = lso.attach(model, split_loss(), [lso.MicroBatch(rank, batch)], products=mode, checked=False)  # type: ignore[arg-type]
        v = space.noise(0).vector()
        total = space.layout.numel * 4
        out[mode] = peak_of_gathered(lambda: oracle.hvp(v), space.shards) / total  # noqa: B023
        out[f"{mode} again"] = peak_of_gathered(lambda: oracle.hvp(v), space.shards) / total  # noqa: B023
        oracle.products.close()
    return out


def peak_of_gathered(run: Callable[[], Any], backend: Any) -> float:
    """Bytes of whole parameters, weights or directions, that are alive at once while `run` runs: counted by the end of
    their storages, so what autograd saves counts as long as it saves it.
    """
    import weakref

    alive: dict[int, int] = {}
    peak = [0]
    plain = backend.all_gather

    def counted(pieces: Any, wanted: Any, dtype: Any) -> list[Tensor]:
        out = plain(pieces, wanted, dtype)
        for t in out:
            storage = t.untyped_storage()
            key = storage._cdata
            alive[key] = storage.nbytes()
            weakref.finalize(storage, alive.pop, key, None)
        peak[0] = max(peak[0], sum(alive.values()))
        return out

    backend.all_gather = counted
    try:
        run()
    finally:
        del backend.all_gather
    return float(peak[0])


def extra_bytes(kind: str) -> dict[str, float]:
    """What a vector and a basis add to a rank, as shares of the whole model's bytes."""
    from elastic_lsopt.space.basis import Basis

    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 48, bias=False))
    engine = engines.build(kind, model, lso.Plain(), loss_fn=split_loss())
    space = engine.space
    basis = Basis(space, 5)
    for _ in range(5):
        basis.append(space.zeros())
    whole = space.layout.numel * 4
    out = {"vector": space.zeros().local_bytes / whole, "basis of 5": basis.local_bytes / whole}
    assert math.isfinite(out["vector"])
    engines.close(engine)
    return out
