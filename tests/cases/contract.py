"""The contract of a space, as cases for one engine kind each: lengths, moves and noise against plain whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import elastic_lsopt as lso
from elastic_lsopt.space.random.noise import block_seed, fill_normal_
from elastic_lsopt.space.vector import Scales, Vector
from tests.cases import engines

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
EXTRA = ("tied", "frozen", "unused")


def collectives(run: Callable[[], Any]) -> list[str]:
    """The gloo collectives that this rank really took part in while it ran, as torch's profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    return [e.name() for e in prof.profiler.kineto_results.events() if e.name().startswith("gloo:")]  # type: ignore[union-attr]


def dtype_of(kind: str, dtype: str, bf16: bool) -> torch.dtype:
    """ZeRO in bf16 holds a bf16 model; FSDP2's bf16 policy casts an fp32 one."""
    return torch.bfloat16 if bf16 and kind.startswith("zero") else DTYPES[dtype]


def engine_of(
    kind: str, zero: dict[str, Any] | None, bf16: bool, dtype: str = "fp32", extra: Sequence[str] = EXTRA, **more: Any
) -> lso.Engine:
    model = engines.net(extra, dtype_of(kind, dtype, bf16))
    return engines.build(kind, model, more.pop("method", lso.Plain()), zero=zero, bf16=bf16, **more)


def plain_values(shape: Sequence[int], name: str, which: int) -> Tensor:
    """A known function of a parameter's name and an element's index, in fp32 (so that it is exact in any vector)."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index * (1.7 + which) + sum(name.encode())).float().reshape(tuple(shape))


def shapes(extra: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trainable parameters as the user's own module has them."""
    return {n: tuple(p.shape) for n, p in engines.net(extra).named_parameters() if p.requires_grad}


def rows_of(t: Tensor) -> Tensor:
    """(rows, row length): an output neuron a row; a 1-D parameter is one row."""
    return t.reshape(t.shape[0], -1) if t.dim() > 1 else t.reshape(1, -1)


def vector_of(space: Any, whole: dict[str, Tensor]) -> Vector:
    """The space's vector with these values, each piece filled by name and offset."""
    out = space.zeros()
    for piece, t in zip(space.layout.pieces, out.tensors, strict=True):
        flat = whole[space.layout.parameters[piece.parameter].name].reshape(-1)
        t.copy_(flat[piece.offset : piece.offset + piece.length])
    return out


def gathered(space: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pieces of all ranks put together by name and offset, in fp64; raises where two ranks hold different values."""
    layout = space.layout
    starts, total = {}, 0
    for i, p in enumerate(layout.parameters):
        starts[i] = total
        total += p.numel
    lowest = torch.full((total,), torch.inf, dtype=torch.float64, device=engines.DEVICE)
    highest = -lowest
    for piece, t in zip(layout.pieces, tensors, strict=True):
        at = starts[piece.parameter] + piece.offset
        lowest[at : at + piece.length] = highest[at : at + piece.length] = t.detach().double()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    assert torch.equal(lowest, highest), "ranks differ, or no rank holds some element"
    lowest = lowest.cpu()
    return {p.name: lowest[starts[i] : starts[i] + p.numel].reshape(p.shape) for i, p in enumerate(layout.parameters)}


def off(ours: float, wanted: float) -> float:
    return abs(ours - wanted) / abs(wanted)


def furthest(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert set(ours) == set(wanted), set(ours) ^ set(wanted)
    return max(float((ours[n].double().cpu() - wanted[n].double().cpu()).abs().max()) for n in wanted)


def geometry(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, Any]:
    """Relative distance of dot and the norms from plain fp64 tensors, and the collectives of each reduction."""
    engine = engine_of(kind, zero, bf16)
    space = engine.space
    plain = shapes(EXTRA)
    a = {n: plain_values(s, n, 0) for n, s in plain.items()}
    b = {n: plain_values(s, n, 1) for n, s in plain.items()}
    va, vb = vector_of(space, a), vector_of(space, b)
    order = [p.name for p in space.layout.parameters]
    wide = {n: t.double() for n, t in a.items()}
    square = sum(float((t * t).sum()) for t in wide.values())
    dot = sum(float((t * b[n].double()).sum()) for n, t in wide.items())
    per_parameter = torch.stack([wide[n].square().sum().sqrt() for n in order])
    per_row = torch.cat([rows_of(wide[n]).square().sum(1).sqrt() for n in order])
    names_right = {p.name: p.shape for p in space.layout.parameters} == plain
    out = {
        "names": names_right,
        "numel": space.layout.numel == sum(t.numel() for t in a.values()),
        "dot": off(space.dot(va, vb), dot),
        "norm": off(space.norm(va), math.sqrt(square)),
        "per_parameter": float((space.norm_per_parameter(va).values.cpu() / per_parameter - 1).abs().max()),
        "per_row": float((space.norm_per_row(va).values.cpu() / per_row - 1).abs().max()),
        "linear": furthest(
            gathered(space, (2.0 * va - vb * va + -vb).tensors),
            {n: 2 * t - b[n].double() * t - b[n].double() for n, t in wide.items()},
        ),
        "collectives": [
            len(collectives(reduction))
            for reduction in (
                lambda: space.dot(va, vb),
                lambda: space.norm(va),
                lambda: space.norm_per_parameter(va),
                lambda: space.norm_per_row(va),
            )
        ],
        "sharded_over": 1 if space.shards.shard_group is None else dist.get_world_size(space.shards.shard_group),
        "pieces": len(space.layout.pieces),
    }
    engines.close(engine)
    return out


def moves(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, float]:
    """Largest distance of perturbed weights from plain ones: a scale in all, a parameter, a row; vectors and noise."""
    engine = engine_of(kind, zero, bf16)
    space = engine.space
    plain = shapes(EXTRA)
    start = gathered(space, space.weights.tensors)
    d = {n: plain_values(s, n, 2) for n, s in plain.items()}
    z = {}
    for n, s in plain.items():
        z[n] = fill_normal_(torch.empty(math.prod(s)), seed=block_seed(space.seed, 5, 3), name=n, offset=0).reshape(s)
    order = [p.name for p in space.layout.parameters]
    by_parameter = {n: 0.01 * (i + 1) for i, n in enumerate(order)}
    by_row: dict[str, Tensor] = {}
    count = 0
    for n in order:
        by_row[n] = 0.01 * (count + torch.arange(rows_of(d[n]).shape[0]).double())
        count += len(by_row[n])
    per_parameter = torch.tensor(list(by_parameter.values()), dtype=torch.float64, device=space.shards.device)
    parameter_scales = Scales(per_parameter, "parameter")
    row_scales = Scales(torch.cat(list(by_row.values())).to(space.shards.device), "row")

    def scaled(direction: dict[str, Tensor], scale: Any) -> dict[str, Tensor]:
        out = {}
        for n, t in direction.items():
            rows = [scale(n, r) * row for r, row in enumerate(rows_of(t.double()))]
            out[n] = start[n] + torch.stack(rows).reshape(t.shape)
        return out

    vector, noise = vector_of(space, d), space.noise(5, 3)
    out = {"noise": furthest(gathered(space, noise.vector().tensors), z)}
    for name, direction, values in (("vector", vector, d), ("noise", noise, z)):
        for per, scale, rule in (
            ("model", -0.3, lambda n, r: -0.3),
            ("parameter", parameter_scales, lambda n, r: by_parameter[n]),
            ("row", row_scales, lambda n, r: by_row[n][r]),
        ):
            with space.perturbed(direction, scale):
                out[f"{name} per {per}"] = furthest(gathered(space, space.shards.working), scaled(values, rule))
    with space.perturbation() as walk:
        walk.move(vector, 0.5)
        walk.move(noise, -0.25)
        out["walk"] = furthest(
            gathered(space, space.shards.working), {n: start[n] + 0.5 * d[n] - 0.25 * z[n] for n in d}
        )
    out["back"] = furthest(gathered(space, space.weights.tensors), start)
    engines.close(engine)
    return out


def fidelity(kind: str, length: float, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, float]:
    """What the space reports of a perturbation, and the same from plain whole tensors rounded as the forward rounds."""
    engine = engine_of(kind, zero, bf16, extra=())
    space = engine.space
    space.fidelity.always = True
    start = gathered(space, space.weights.tensors)
    d = {n: plain_values(s, n, 2) for n, s in shapes(()).items()}
    scale = length / math.sqrt(sum(float(t.double().square().sum()) for t in d.values()))
    with space.perturbed(vector_of(space, d), scale) as walk:
        pass
    assert walk.fidelity
    seen = torch.bfloat16 if bf16 else torch.float32
    got = torch.cat(
        [
            ((start[n].float() + scale * d[n]).to(seen).double() - start[n].float().to(seen).double()).reshape(-1)
            for n in d
        ]
    )
    asked = torch.cat([(scale * d[n].double()).reshape(-1) for n in d])
    out = {
        "cosine": walk.fidelity.cosine,
        "ratio": walk.fidelity.norm_ratio,
        "asked": walk.fidelity.requested_norm,
        "plain cosine": float(got @ asked / (got.norm() * asked.norm())),
        "plain ratio": float(got.norm() / asked.norm()),
    }
    engines.close(engine)
    return out


def retired(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, str]:
    """What each use of a space and its vectors raises after `retire()`."""
    engine = engine_of(kind, zero, bf16, extra=())
    space = engine.space
    vector = space.zeros()
    oracle = engine.oracle(engines.mine(engines.batches(1, 3, dtype=dtype_of(kind, "fp32", bf16))[0]))
    borrowed = oracle.gradient()
    space.retire()

    def displace() -> None:
        with space.perturbed(space.noise(0), 0.1):
            pass

    uses: dict[str, Callable[[], Any]] = {
        "tensors": lambda: vector.tensors,
        "clone": vector.clone,
        "norm": lambda: space.norm(vector),
        "lease": lambda: borrowed.tensors,
        "norm of the borrowed gradient": lambda: space.norm(borrowed),
        "weights": lambda: space.weights.tensors,
        "perturbed": displace,
        "gradient": oracle.gradient,
        "loss": oracle.loss,
        "settle": space.resync,
    }
    out = {}
    for name, use in uses.items():
        try:
            use()
            out[name] = "nothing"
        except Exception as error:
            out[name] = type(error).__name__
    engines.close(engine)
    return out
