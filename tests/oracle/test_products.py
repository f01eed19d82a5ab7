"""Law 1 for products: exact against whole matrices built by brute force, on every backend, world and odd parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.cases import engines
from tests.cases.probes.products import plain_products
from tests.laws.cover import daily, joined


def test_the_reference() -> None:
    """The plain double backward of `plain_products` against whole matrices: torch's Hessian, and torch.func's
    where torch 2.13 has it right (it does not through a LayerNorm's weights).
    """
    plain = engines.net(dtype=torch.float64)
    x, y = engines.batches(1, 1, size=6, dtype=torch.float64)[0][0]
    names = [n for n, _ in plain.named_parameters()]
    sizes = [p.numel() for p in plain.parameters()]
    w = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
    v = torch.sin(torch.arange(len(w), dtype=torch.float64))

    def loss(flat: Tensor) -> Tensor:
        parts = {n: t.view(p.shape) for (n, p), t in zip(plain.named_parameters(), flat.split(sizes), strict=True)}
        return nn.functional.cross_entropy(functional_call(plain, parts, (x,)), y)

    Hv, _ = plain_products(plain, [(x, y)], v, 0, False)
    assert torch.allclose(torch.autograd.functional.hessian(loss, w) @ v, Hv, rtol=0, atol=1e-13)
    norm = [i for i, n in enumerate(names) if n.startswith("norm")]
    without = torch.ones_like(w)
    for i in norm:
        without[sum(sizes[:i]) : sum(sizes[: i + 1])] = 0
    H = torch.func.hessian(lambda part: loss(w * (1 - without) + part * without))(w)
    Hv, _ = plain_products(plain, [(x, y)], v * without, 0, False)
    assert torch.allclose((H @ (v * without)) * without, Hv * without, rtol=0, atol=1e-13)


FP64 = [("plain", 1), ("ddp", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3)]
FP64 += [("fsdp2-kept", 2), ("hsdp", 1), ("hsdp", 2), ("hsdp", 4)]
ZERO = [f"zero{stage}" for stage in (0, 1, 2, 3)]
FAST = [("plain", 1), ("fsdp2", 2)]


def fast_or_not(cases: list[tuple[str, int]]) -> list[Any]:
    return [pytest.param(*c, marks=pytest.mark.fast if c in FAST else ()) for c in cases]


@pytest.mark.parametrize("kind,world", fast_or_not(FP64))
def test_exact_in_fp64(ranks: Any, kind: str, world: int) -> None:
    """Fewer units than ranks and more; 11 and 13 rows, one row, so that some ranks hold no piece of a parameter."""
    for units in (2, 5) if world > 2 else (5,):
        for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, dtype="fp64", units=units):
            assert max(r.values()) < 1e-11, r


@pytest.mark.parametrize(
    "kind,world,extra",
    daily(
        [("plain", 1), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)],
        [["tied"], ["frozen"], ["lora"], ["dropout"], ["tied", "frozen", "dropout"]],
    ),
    ids=joined,
)
def test_odd_parameters(ranks: Any, kind: str, world: int, extra: list[str]) -> None:
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, dtype="fp64", extra=extra):
        assert max(r.values()) < 1e-11, r


@pytest.mark.parametrize(
    "kind,world,extra",
    daily([("plain", 1), ("fsdp2", 2), ("fsdp2", 3)], [[], ["tied"], ["lora"], ["dropout", "frozen"]]),
    ids=joined,
)
def test_a_transformer(ranks: Any, kind: str, world: int, extra: list[str]) -> None:
    """Layers in a list, attention, arguments by keyword, a head that is the embedding."""
    arguments = {"kind": kind, "dtype": "fp64", "model": "transformer", "extra": extra, "units": 4}
    for r in ranks(world).run("tests.cases.probes.products:products", **arguments):
        assert max(r.values()) < 1e-11, r


@pytest.mark.parametrize(
    "kind,world,extra",
    daily(ZERO, (1, 2, 3), ([], ["tied", "frozen", "dropout"], ["lora"]), together=2),
    ids=joined,
)
def test_exact_under_zero(ranks: Any, kind: str, world: int, extra: list[str]) -> None:
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, extra=extra, units=4):
        assert max(r.values()) < 1e-5, r


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_transformer_under_zero(ranks: Any, kind: str) -> None:
    arguments = {"kind": kind, "model": "transformer", "extra": ["tied"], "units": 3}
    for r in ranks(2).run("tests.cases.probes.products:products", **arguments):
        assert max(r.values()) < 1e-5, r


@pytest.mark.parametrize(
    "kind,world",
    [
        ("ddp", 2), ("fsdp2", 3), ("zero3", 2),
        *(pytest.param(*c, marks=pytest.mark.full) for c in (("plain", 1), ("hsdp", 4), ("zero1", 2))),
    ],
)  # fmt: skip
def test_exact_in_fp32(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind):
        assert max(r.values()) < 1e-5, r


@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2), ("zero3", 2)])
def test_differences(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, modes=["differences"]):
        assert max(r["differences H"], r["differences H again"]) < 2e-3, r


@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2), ("zero2", 2)])
def test_at_displaced_weights(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, perturbed=True):
        assert max(r.values()) < 1e-5, r


@pytest.mark.parametrize(
    "kind,world", [("fsdp2", 2), ("zero3", 2), *(pytest.param(f"zero{n}", 2, marks=pytest.mark.full) for n in (1, 2))]
)
def test_an_engine_in_bf16(ranks: Any, kind: str, world: int) -> None:
    """Products are taken in fp32 at the masters: as exact as without bf16."""
    for r in ranks(world).run("tests.cases.probes.products:products", kind=kind, bf16=True):
        assert max(r.values()) < (1e-5 if kind == "fsdp2" else 0.02), r  # ZeRO's masters begin as rounded weights


@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)])
def test_a_kept_graph_follows_the_weights(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.products:follows_the_weights", kind=kind):
        assert r["came back"] == 1.0 and r["again"] < 1e-6 * r["size"], r
        assert min(r["perturbed"], r["stepped"]) > 1e-2 * r["size"] and r["stepped, apart"] < 1e-6 * r["size"], r


SAYS = {
    "random": "UserError: the gradient is not deterministic: two passes",
    "sum": "UserError: the loss is not a mean: it grows from",
    "nan": "NonFinite: step 0, pass 1: loss nan",
    "hook": "UserError: the gradient through the bare module differs from the engine's by",
    "constant": "differences, error ",
    "once": "differences, error ",
    "constant by name": "Unsupported: products='kept' needs a second derivative",
    "unknown": "UserError: products='fast' is unknown; use one of auto, kept",
    "not split": "UserError: Gauss-Newton products need the loss in two steps",
    "right": "kept, error None",
}


@pytest.mark.parametrize("what", SAYS)
@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2)])
def test_checks(ranks: Any, kind: str, world: int, what: str) -> None:
    for r in ranks(world).run("tests.cases.probes.products:refusals", kind=kind, what=what):
        assert r["said"].startswith(SAYS[what]) and "\n" not in r["said"], r


def test_what_a_hostile_reader_found(ranks: Any) -> None:
    [r] = ranks(1).run("tests.cases.probes.products:found_by_a_hostile_reader", kind="plain")
    assert r["refused each time"] == ["UserError: the loss is not a mean: it gr"] * 2, r
    for when in ("at first", "after .data", "after eval()", "after a fused step"):
        assert r[when] < 1e-5, (when, r)
    assert r["H g with a lease"] == "nothing", r
    assert r["a weight read elsewhere"].startswith("Unsupported: parameter last.weight is used outside of its"), r
    assert r["v is the caller's"] == 0.0, r


def test_unequal_units_under_ddp(ranks: Any) -> None:
    for r in ranks(2).run("tests.cases.probes.products:unequal_units_blockwise"):
        assert r["blockwise"] == pytest.approx(r["kept"], rel=1e-5), r


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_holds_more_than_a_block(ranks: Any, world: int) -> None:
    """Eight equal blocks: weights and a direction of one are 0.25 of the model; all at once they would be 2."""
    for r in ranks(world).run("tests.cases.probes.products:bytes_blockwise"):
        assert max(r["blockwise"], r["blockwise again"]) < 0.3, r
        assert r["rebuilt"] > 1.9, r


@pytest.mark.parametrize("kind,world", [("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("zero3", 2)])
def test_a_vector_is_sharded(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.products:extra_bytes", kind=kind):
        assert r == {"vector": pytest.approx(1 / world), "basis of 5": pytest.approx(5 / world)}
