"""The oracle's contract: exact weighted means, idle slots, skipped steps, borrowed gradients, parts, the stop flag."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import daily
from tests.processes.ranks import Ranks

FRAMEWORK = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2-kept", 3), ("hsdp", 2), ("hsdp", 4)]
CASES = [(kind, world) for kind in ("ddp", "fsdp2", "fsdp2-kept", "hsdp") for world in (1, 2, 3, 4)]
FAST = FRAMEWORK[:2]


def fast_or_not(cases: list[tuple[str, int]]) -> list[Any]:
    return [pytest.param(*c, marks=pytest.mark.fast if c in FAST else ()) for c in cases]


@pytest.mark.parametrize(
    "kind,world,units,parts,empty", daily(CASES, [(1, 1, None), (7, 1, None), (7, 3, 4), (4, 4, 3)])
)
def test_exact_mean(ranks: Any, kind: str, world: int, units: int, parts: int, empty: int | None) -> None:
    """Uneven units and labels; one unit on several ranks; a unit without a label, whose own loss is NaN."""
    arguments = {"kind": kind, "units": units, "parts": parts, "empty": empty}
    for r in ranks(world).run("tests.cases.oracle_contract:weighted_mean", **arguments):
        assert max(r.values()) < 1e-12, r


@pytest.mark.parametrize("kind,world", [("fsdp2", 2), ("hsdp", 4)])
def test_exact_mean_under_a_bf16_policy(ranks: Any, kind: str, world: int) -> None:
    arguments = {"kind": kind, "units": 7, "parts": 3, "empty": 4, "bf16": True, "dtype": "fp32"}
    for r in ranks(world).run("tests.cases.oracle_contract:weighted_mean", **arguments):
        assert max(r.values()) < 2e-2, r  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    "kind,world,method,bad_pass,passes",
    daily(
        [("ddp", 1), *FRAMEWORK],
        [("none", 1, 1), ("sam", 1, 1), ("sam", 2, 2), ("asam", 2, 2), ("lpf_sgd", 1, 1)],
    ),
)
def test_a_loss_that_is_not_finite(ranks: Any, kind: str, world: int, method: str, bad_pass: int, passes: int) -> None:
    """One unit's, on one rank, in either pass: nobody steps, the samples count, the next step is the paper's."""
    for r in ranks(world).run("tests.cases.oracle_contract:poisoned", kind=kind, method=method, bad_pass=bad_pass):
        assert r["skipped"] and r["count"] == 1 and r["same"] and r["settled"], r
        assert (r["samples"], r["steps"]) == (2 * 36, 2), r
        assert len(r["messages"]) == 1 and f"step 1, pass {passes}" in r["messages"][0], r
        assert not r["next skipped"] and r.get("dw", 0.0) < 1e-6, r


@pytest.mark.parametrize("kind,world", fast_or_not([("ddp", 1), *FRAMEWORK]))
def test_borrowed_gradients(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.oracle_contract:borrowed_gradients", kind=kind):
        stale = {"another_pass", "another_oracle", "install", "step", "own_step"}
        assert r == {**dict.fromkeys(stale, "StaleGradient"), "loss": "same", "own_install": "same"}


@pytest.mark.parametrize("kind,world", fast_or_not(FRAMEWORK))
def test_install(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.oracle_contract:installed", kind=kind):
        assert r["dw"] < 1e-6 and r["norm"] < 1e-6, r


SAYS = {
    "parts_out_of_order": "RuntimeError: part 1 of 3 ran where part 0 was due",
    "missing_part": "RuntimeError: 1 of 2 parts ran",
    "no_part": "RuntimeError: 0 of 0 parts ran",
    "other_cut": "RuntimeError: part 1 of 3 ran where part 1 was due",
    "outside": "RuntimeError: part.backward() runs inside",
    "early": "RuntimeError: the gradient is there when",
    "twice_in_one_rank": "UserError: 1 micro-batch(s)",
    "at_the_wrong_rank": "UserError: 2 rank(s) got a micro-batch that is another's",
    "nothing to do": "UserError: 1 of ",
    "too many parts": "UserError: a step of 6 micro-batch(es) cannot be cut into 7 part(s)",
    "no weight": "UserError: the total weight of the global batch is 0.0",
}


@pytest.mark.parametrize("kind,world", fast_or_not([("ddp", 1), *FRAMEWORK[:2]]))
def test_wrong_uses(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.oracle_contract:misuses", kind=kind):
        assert r.pop("then") == "trains"
        for use, said in r.items():
            assert said.startswith(SAYS[use]), (use, said)
            assert "\n" not in said


@pytest.mark.parametrize("kind,world", fast_or_not([("ddp", 1), *FRAMEWORK]))
def test_stop_reaches_all_ranks(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.oracle_contract:stopped", kind=kind):
        assert r == [False, True, True]


@pytest.mark.parametrize("kind,world", [("ddp", 1), ("fsdp2", 2)])
def test_batch_norm_is_refused(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.oracle_contract:batch_norm", kind=kind):
        assert r["said"].startswith("1 (") and "BatchNorm1d) is in training mode" in r["said"], r
        assert r["loss"] > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_bad_batch_on_one_rank(kind: str) -> None:
    """Before any pass: the others wait for this rank in the sum of the weights."""
    group = Ranks(2)
    try:
        out = group.run("tests.cases.oracle_contract:bad_batch_on_one_rank", kind=kind, timeout_s=40)
    finally:
        group.stop()
    for r in out:
        assert "holds no tensor with a first dimension" in r["said"] and r["seconds"] < 30, r
