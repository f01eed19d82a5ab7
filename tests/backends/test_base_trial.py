"""A base that needs whole parameters is refused where it would not get them, and only there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.backends.base_trial import ELEMENT_WISE, reason_against_flat
from tests.cases.bases import Lars, Signs

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"])
def test_lars_of_a_users_own(ranks: Any, kind: str) -> None:
    """Right where it sees matrices or DTensors; refused on flat pieces, which gave another loss without a word."""
    for r in ranks(2).run("tests.cases.bases:trained", kind=kind, base="lars"):
        if kind in ("zero1", "zero2", "zero3"):
            assert r["said"].startswith(f"Unsupported: base Lars needs whole parameters and ZeRO stage {kind[4]} gives")
            assert "\n" not in r["said"] and "element by element" in r["said"]
        else:
            assert r["said"] == "" and r["loss"] == pytest.approx(r["plain"], rel=2e-6)


@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero3"])
def test_one_that_nobody_knows_but_is_element_wise(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.bases:trained", kind=kind, base="signs"):
        assert r["said"] == "" and r["loss"] == pytest.approx(r["plain"], rel=2e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_norms_of_what_a_rank_holds(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.bases:trained", kind=kind, base="local_lars"):
        if kind == "ddp":
            assert r["said"] == "" and r["loss"] == pytest.approx(r["plain"], rel=2e-6)
        else:
            assert r["said"].startswith("Unsupported: base LocalLars needs whole parameters and FSDP2 gives"), r
            assert "to_local" in r["said"] and "\n" not in r["said"]


def test_a_step_that_asks_for_a_closure(ranks: Any) -> None:
    for kind in ("plain", "zero1"):
        [r] = ranks(1).run("tests.cases.bases:trained", kind=kind, base="lbfgs")
        assert r["said"].startswith("UserError: base LBFGS: its step() needs a closure"), r
    x = nn.Parameter(torch.ones(3))
    optimizer = lso.LandscapeOptimizer(torch.optim.LBFGS([x]), lso.SAM(rho=0.1))
    with pytest.raises(lso.UserError, match="base LBFGS: its step"):
        optimizer.step(x.sum)


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(kind.__name__ for kind in ELEMENT_WISE))
def test_the_known_ones_pass_the_trial(name: str) -> None:
    """As subclasses, which are tried."""
    kind = getattr(torch.optim, name)
    made = type(f"My{kind.__name__}", (kind,), {})([nn.Parameter(torch.ones(4, 3))], lr=0.0)
    assert reason_against_flat(made, [1, 2, 4], CPU) is None


class Global(Lars):
    """A step of the length of the rate, over all parameters: right on one rank's flat piece of everything."""

    def ratio(self, w: Any, g: Any) -> Any:
        every = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        return 1 / torch.stack(every).norm()


class MatricesOnly(Lars):
    def ratio(self, w: Any, g: Any) -> Any:
        return torch.tensor(1.0 if w.dim() > 1 else 0.5)


class Late(Signs):
    """Keeps a factor of each matrix for later, as Shampoo does, and does not use it in its first steps."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for p in (p for group in self.param_groups for p in group["params"] if p.dim() == 2):
            self.state[p]["left"] = p.grad @ p.grad.T


class Fails(Signs):
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("needs\na friend")


@pytest.mark.fast
@pytest.mark.parametrize(
    "kind,says",
    [
        (Lars, "its steps end "), (Global, "its steps end "), (MatricesOnly, "its steps end "),
        (torch.optim.Adafactor, "end|keeps the state"), (torch.optim.Muon, "cannot be tried|its steps end"),
        (Late, "keeps the state 'left' in another shape"), (Fails, "RuntimeError: needs a friend"),
    ],
)  # fmt: skip
def test_what_needs_shapes(kind: Any, says: str) -> None:
    reason = reason_against_flat(kind([nn.Parameter(torch.ones(4, 3))], lr=0.1), [2, 1], CPU)
    assert reason is not None and any(word in reason for word in says.split("|")), reason


@pytest.mark.fast
def test_a_trial_leaves_no_trace() -> None:
    """The optimizer's weights, state, attributes and rate, and torch's generator, are what they were."""

    class Counting(Signs):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.slow = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}
            self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

        def step(self, closure: Any = None) -> None:
            super().step()
            self.inner.step()
            for p in self.slow:
                self.slow[p] += torch.randn(()) * 0
                self.state[p]["n"] = self.state[p].get("n", 0) + 1

        def __del__(self) -> None:
            freed.append(self)

    freed: list[Any] = []
    w = nn.Parameter(torch.ones(4, 3))
    base = Counting([w])
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda _: 0.0)
    before = torch.get_rng_state()
    assert reason_against_flat(base, [2], CPU) is None
    assert torch.equal(torch.get_rng_state(), before) and not freed
    assert torch.equal(w, torch.ones(4, 3)) and w.grad is None and not base.state and not base.inner.state
    assert float(base.slow[w].abs().sum()) == 0.0 and math.isclose(scheduler.get_last_lr()[0], 0.0)
