"""What a product with the Hessian costs beside a gradient: ours in each mode, the peers', and ours under FSDP2.

A gradient is the oracle's, on the same backend in the same rounds. Bytes are those of the collectives of one product,
as a rank sends into a reduction or receives from a gather.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.curvature.model import LOSS, SHAPES, mean_loss, own_batch, sharded, trained
from benchmarks.curvature.peers import products as peers_products
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks, world
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

MODES = ("kept", "rebuilt", "blockwise")


def direction(space: ParameterSpace) -> Vector:
    """A random direction of length 1, the same at any world size."""
    v = space.noise(0, 0).vector()
    return v.mul_(1 / space.norm(v))


def flat(v: Vector) -> torch.Tensor:
    """A whole vector as the peers take it (one process: each piece is a parameter)."""
    return torch.cat([t.reshape(-1) for t in v.tensors])


def compare(size: str) -> dict[str, object]:
    """Every product on one process, and how far those of the peers are from ours."""
    shape = SHAPES[size]
    model, batch = trained(shape), own_batch(shape)
    beside = copy.deepcopy(model)  # the peers use .grad and move weights
    theirs = peers_products(beside, batch)
    ours = {mode: lso.attach(model, LOSS, [batch], products=mode, checked=False) for mode in MODES}
    vectors = {mode: direction(space) for mode, (space, _) in ours.items()}
    v = flat(vectors["kept"])
    works: dict[str, Callable[[], object]] = {
        "gradient": ours["kept"][1].gradient,
        "torch_gradient": lambda: torch.autograd.grad(mean_loss(beside, batch), list(beside.parameters())),
        **{mode: lambda mode=mode: ours[mode][1].hvp(vectors[mode]) for mode in MODES},
        **{name: lambda product=product: product(v) for name, product in theirs.items()},
    }
    figures: dict[str, object] = {"parameters": v.numel()}
    exact = flat(ours["kept"][1].hvp(vectors["kept"]))
    for name, product in theirs.items():
        figures[f"product_{name}_differs_by"] = ((product(v) - exact).norm() / exact.norm()).item()
    times = rounds(shape.pairs, **works)
    figures |= ratio_of(times["torch_gradient"], times["gradient"]).figures("torch_gradient_of_gradient")
    for name in (*MODES, *theirs):
        figures |= ratio_of(times[name], times["gradient"]).figures(f"product_{name}_of_gradient")
    for _, oracle in ours.values():
        oracle.products.close()
    space, oracle = lso.attach(model, LOSS, [batch], checked=False)
    oracle.hvp(direction(space))
    return figures | {"product_auto_chose": oracle.products.chosen}


def compare_sharded(size: str) -> dict[str, object]:
    """Kept and blockwise products under FSDP2 (collective), and the bytes of each."""
    shape = SHAPES[size]
    model, batch = sharded(trained(shape)), own_batch(shape)
    ours = {mode: lso.attach(model, LOSS, [batch], products=mode, checked=False) for mode in ("kept", "blockwise")}
    works: dict[str, Callable[[], object]] = {"gradient": ours["kept"][1].gradient}
    vectors = {mode: direction(space) for mode, (space, _) in ours.items()}
    for mode in ours:
        works[mode] = lambda mode=mode: ours[mode][1].hvp(vectors[mode])
    times = rounds(shape.pairs, **works)
    whole = 4 * ours["kept"][0].layout.numel
    figures: dict[str, object] = {}
    for mode in ours:
        name = f"product_{mode}_fsdp2"
        figures |= ratio_of(times[mode], times["gradient"]).figures(f"{name}_of_gradient")
        moved = exchanged(works[mode])
        figures |= {f"{name}_bytes": moved, f"{name}_bytes_of_model": moved / whole}
    return figures


def exchanged(work: Callable[[], object]) -> int:
    """Bytes of the tensors that a rank's collectives gather into or reduce while `work` runs."""
    total = 0

    def counting(collective: Callable[..., Any], which: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            total += args[which].numel() * args[which].element_size()
            return collective(*args, **kwargs)

        return counted

    with ExitStack() as stack:
        for name, whole in (("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1), ("all_reduce", 0)):
            stack.enter_context(patch.object(dist, name, counting(getattr(dist, name), whole)))
        work()
    return total


def run() -> dict[str, object]:
    """One process, then two (or as many as there are GPUs), each with one thread."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures = {"size": size} | on_ranks("benchmarks.curvature.products:compare", processes=1, size=size)
    return figures | (on_ranks("benchmarks.curvature.products:compare_sharded", size=size) if world() > 1 else {})
