"""A user's own loop on several ranks: accumulation, autocast, batch norm, unfreezing, a static graph."""

from __future__ import annotations

from typing import Any

import pytest

PLACES = [("ddp", 2), ("fsdp2", 2), ("fsdp2-kept", 2)]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind,world", PLACES)
def test_closures_handed_in_are_all_in_each_pass(ranks: Any, kind: str, world: int, called: bool) -> None:
    for r in ranks(world).run("tests.cases.own_loops:accumulated", kind=kind, called=called):
        assert r["dw"] < 1e-12 and r["dloss"] < 1e-12 and not r["refused"], r


@pytest.mark.parametrize("kind,world", PLACES[:2])
def test_accelerate_gives_back_what_accumulates_and_tells(ranks: Any, kind: str, world: int) -> None:
    places = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPNet"}
    for r in ranks(world).run("tests.cases.own_loops:prepared", kind=kind):
        assert r["dw"] < 1e-12 and r["dloss"] < 1e-12 and r["place"] == places[kind], r
        assert r["passes"] == [2] * 3 and r["schedule"] == 3 * world, r


@pytest.mark.parametrize("kind,world", PLACES)
def test_a_gradient_that_is_not_the_steps_is_refused(ranks: Any, kind: str, world: int) -> None:
    """FSDP2 keeps what was not reduced beside the parameters, where nobody sees it in `grad`."""
    for r in ranks(world).run("tests.cases.own_loops:accumulated", kind=kind, called=True, handed_in=False):
        assert r["refused"].startswith("a backward pass outside of step() has left a gradient"), r


@pytest.mark.parametrize("face", ["optimizer", "engine"])
@pytest.mark.parametrize("kind,world", PLACES)
def test_one_autocast_context_or_one_a_pass(ranks: Any, kind: str, world: int, face: str) -> None:
    case = "tests.cases.own_loops:in_autocast"
    around = ranks(world).run(case, kind=kind, face=face, around=True)
    inside = ranks(world).run(case, kind=kind, face=face, around=False)
    for a, b in zip(around, inside, strict=True):
        assert a["moved"] > 1e-2 and a["weights"] == b["weights"]
        assert a["cosine"] == b["cosine"] and 0.9 < a["cosine"] < 1.0, (a["cosine"], b["cosine"])


@pytest.mark.parametrize("kind,world", PLACES[:2])
def test_running_statistics_are_those_of_the_first_passes(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.own_loops:normed", kind=kind):
        assert max(r.values()) < 1e-6, r


@pytest.mark.parametrize(
    "kind,world,again,update",
    [
        ("ddp", 2, False, ""), ("ddp", 2, True, ""), *[(*p, False, "") for p in PLACES[1:]],
        *[
            pytest.param(*p, p[0] == "ddp", update, marks=pytest.mark.full)
            for p in PLACES
            for update in ("lamb", "adaptive_memory_sgd", "soap_none", "lars")
        ],
    ],
)  # fmt: skip
def test_unfreezing(ranks: Any, kind: str, world: int, again: bool, update: str) -> None:
    for r in ranks(world).run("tests.cases.own_loops:unfrozen", kind=kind, again=again, update=update):
        if kind == "ddp" and not again:  # it averages what was trainable when it was built
            assert "was frozen when DistributedDataParallel was built" in r["refused"], r
        else:
            assert r["dw"] < 1e-12 and r["parameters"] > 2, r


@pytest.mark.parametrize("parts", [1, 3])
def test_a_static_graph_with_several_microbatches(ranks: Any, parts: int) -> None:
    for r in ranks(2).run("tests.cases.own_loops:static_graph", parts=parts):
        assert r["dw"] < 1e-12 and r["dloss"] < 1e-12, r


@pytest.mark.parametrize("kind,world", PLACES)
def test_another_model_is_left_alone(ranks: Any, kind: str, world: int) -> None:
    """FSDP2 keeps its modules in a registry of the process; gradients that the other has gathered are its own."""
    for r in ranks(world).run("tests.cases.own_loops:beside_another", kind=kind):
        assert max(r.values()) < 1e-12, r
