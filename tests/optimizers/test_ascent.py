"""The options of the way up, which all of SAM's family share: what is moved, how far, when."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import elastic_lsopt as lso
from tests.optimizers.small_net import Net, adamw, batch, gradient, length, loss_fn, momentum, seen

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "perturb,moved",
    [
        ({"exclude": ["norm.*"]}, ("first.weight", "first.bias", "last.weight", "last.bias")),
        ({"exclude": "*bias"}, ("first.weight", "norm.weight", "last.weight")),
        ({"match": ["first.*", "last.*"], "dims": 2}, ("first.weight", "last.weight")),
        ({"dims": 1}, ("first.bias", "norm.weight", "norm.bias", "last.bias")),
    ],
)
@pytest.mark.parametrize("method", [lso.SAM, lso.ASAM])
def test_which_parameters_move(perturb: dict[str, Any], moved: tuple[str, ...], method: Any) -> None:
    _, e = seen(method(rho=0.2, perturb=perturb))
    assert {n for n, t in e.items() if t.abs().max() > 0} == {*moved}
    if method is lso.SAM:
        g = gradient()
        whole = length(g[n] for n in moved)
        assert all(torch.allclose(e[n], 0.2 * g[n] / whole, rtol=0, atol=1e-12) for n in moved)


@pytest.mark.parametrize("radius", ["parameter", "row"])
def test_lengths_of_what_moves(radius: Any) -> None:
    _, e = seen(lso.SAM(rho=0.2, radius=radius, perturb={"exclude": "norm.*"}))
    assert float(e["norm.weight"].abs().max()) == 0
    rows = e["first.weight"] if radius == "row" else [e["first.weight"]]
    assert all(math.isclose(float(row.norm()), 0.2, rel_tol=1e-9) for row in rows)


def test_noise_spares_what_is_excluded() -> None:
    for method in (lso.LPFSGD(parts=1, gamma=0.1, alpha=1.0, perturb={"exclude": "norm.*"}), lso.RandomSAM(rho=0.2)):
        model = Net().double()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine = lso.Engine.of(model, torch.optim.SGD(model.parameters(), lr=0.1), method=method, loss_fn=loss_fn)
        at: dict[str, Tensor] = {}
        model.register_forward_pre_hook(
            lambda *_, model=model, at=at: at.update({n: p.detach().clone() for n, p in model.named_parameters()})
        )
        engine.train_batch([batch()])
        e = {n: at[n] - before[n] for n in at}
        assert float(e["first.weight"].abs().max()) > 0
        if isinstance(method, lso.LPFSGD):
            assert float(e["norm.weight"].abs().max()) == 0
        else:
            assert math.isclose(length(e.values()), 0.2, rel_tol=1e-9)


@pytest.mark.parametrize(
    "shape,at", [("linear", [0.1, 0.2, 0.3, 0.4]), ("cosine", None), ("step", [0.1, 0.5, 0.5, 0.5])]
)
def test_rho_moves_with_the_run(shape: str, at: list[float] | None) -> None:
    """On steps 0 to 3 of 4: linear from 0.1 to 0.5, half a cosine, and a step after the first quarter is begun."""
    rho: Any = {"start": 0.1, "end": 0.5, "shape": shape}
    wanted = at or [0.1 + 0.4 * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    for step in range(4):
        model = Net().double()
        engine = lso.Engine.of(
            model, torch.optim.SGD(model.parameters(), lr=0.0), method=lso.SAM(rho=rho), loss_fn=loss_fn,
            total_samples=32,
        )  # fmt: skip
        points: list[list[Tensor]] = []
        model.register_forward_pre_hook(
            lambda *_, model=model, points=points: points.append([p.detach().clone() for p in model.parameters()])
        )
        for _ in range(step + 1):
            points.clear()
            engine.train_batch([batch()])
        e = length(a - b for a, b in zip(points[1], points[0], strict=True))
        assert math.isclose(e, wanted[step], rel_tol=1e-9), (step, e)


def test_every_and_passes() -> None:
    assert [len(seen(lso.SAM(rho=0.1, every=3), steps=n)) for n in (1, 2, 3, 4)] == [2, 1, 1, 2]
    assert [len(seen(lso.LookSAM(rho=0.1, k=2), steps=n)) for n in (1, 2, 3)] == [2, 1, 2]
    assert [len(seen(lso.MomentumSAM(rho=0.1), base=momentum, steps=n)) for n in (1, 2)] == [1, 1]


REFUSED: list[tuple[Any, Any, str]] = [
    (lso.MomentumSAM, lambda ps: torch.optim.SGD(ps, lr=0.1),
     "MomentumSAM needs a base that keeps momentum, and the base is SGD without momentum; give one that has"),
    (lambda: lso.SAM(precondition="adam"), momentum,
     "SAM needs a base that keeps second moments, and the base is SGD; give one that has (AdamW, Adam, RMSprop, LAMB)"),
    (lso.SAMPa, adamw, "SAMPa needs SGD, and the base is AdamW; give torch.optim.SGD"),
    (lso.FunctionalSAM, momentum, "FunctionalSAM needs the logits: the logits need the loss in two steps"),
    (lso.ESAM, momentum, "ESAM needs the logits: the logits need the loss in two steps"),
    (lambda: lso.SAM(perturb={"exclude": ["*nrm*"]}), momentum, "perturb: no parameter matches '*nrm*'; names are"),
    (lambda: lso.GSAM(perturb={"dims": 7}), momentum, "perturb: no parameter is left to move (match=['*'], exclude="),
    (lambda: lso.SAM(perturb={"only": "*"}), momentum, "perturb has no key 'only'; A schedule"),
    (lambda: lso.SAM(rho={"start": 0.1}), momentum, "rho={'start': 0.1} has no end; give start and end"),
    (lambda: lso.SAM(rho={"start": 0.1, "end": 1, "shape": "sine"}), momentum, "rho.shape='sine' must be one of"),
    (lambda: lso.SAM(rho={"start": 0.1, "end": 1, "after": 1}), momentum, "rho: after=1 and until=1.0 must be shares"),
    (lambda: lso.RandomSAM(precondition="adam"), adamw, "precondition='adam' must be none: noise has no gradient"),
    (lambda: lso.SAM(precondition="adam_metric", radius="row"), adamw, "radius='row' must be model where precondition"),
    (lambda: lso.LookSAM(every=2), momentum, "every=2 must be 1: looksam's own interval is k"),
    (lambda: lso.WSAM(gamma=1.0), momentum, "gamma=1.0 must be a number >= 0 and < 1"),
    (lambda: lso.ESAM(beta=0.0), momentum, "beta=0.0 must be a number > 0 and <= 1"),
    (lambda: lso.RWP(alpha=1.5), momentum, "alpha=1.5 must be a number in [0, 1]"),
    (lambda: lso.EntropySGD(inner_lr=0.0), momentum, "inner_lr=0.0 must be a number > 0"),
    (lambda: lso.EntropySGD(gamma0=25.0), momentum, "gamma0=25.0 must be a number < 2 / inner_lr = 20"),
    (lambda: lso.EntropySGD(inner_steps=-1), momentum, "inner_steps=-1 must be a whole number >= 0"),
]  # fmt: skip


@pytest.mark.parametrize("method,base,says", REFUSED, ids=[says[:24] for *_, says in REFUSED])
def test_refused_at_construction_in_one_line(method: Any, base: Any, says: str) -> None:
    model = Net().double()
    with pytest.raises(lso.UserError) as caught:
        lso.Engine.of(model, base(model.named_parameters()), method=method(), loss_fn=loss_fn)
    assert str(caught.value).startswith(says.replace("A schedule", "")) and "\n" not in str(caught.value), caught.value


def test_a_schedule_needs_the_length_of_the_run() -> None:
    with pytest.raises(lso.UserError, match=r"^rho=\{'start': 0.1, 'end': 0.2\} moves over the run, whose length"):
        seen(lso.SAM(rho={"start": 0.1, "end": 0.2}), total=None)


@pytest.mark.parametrize("door", ["optimizer", "engine"])
@pytest.mark.parametrize(
    "method,keep,says",
    [
        (lso.SAM(rho={"start": 0.0, "end": 0.1}), None, "rho={'start': 0.0, 'end': 0.1} moves over the run, whose"),
        (lso.AESAM(), None, "c (from lambda2 to lambda1)={'start': 1.0, 'end': -1.0} moves over the run, whose length"),
        (lso.LPFSGD(), None, "gamma (a number with alpha: 1)={'start': 0.0005, 'end': 0.0075, 'shape': 'cos"),
        (lso.SAM(), "swa", "swa: 0.75 of the run is asked for, whose length is not known"),
    ],
)  # fmt: skip
def test_a_run_of_unknown_length_is_refused_when_it_is_built(method: Any, keep: Any, says: str, door: str) -> None:
    model = Net().double()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    kept = [lso.averages.build(keep)] if keep else []
    with pytest.raises(lso.UserError) as caught:
        if door == "engine":
            lso.Engine.of(model, base, method=method, loss_fn=loss_fn, keep=kept)
        else:
            lso.LandscapeOptimizer(base, method, keep=kept)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_ae_sam_with_one_threshold_needs_no_length() -> None:
    assert len(seen(lso.AESAM(rho=0.2, lambda1=-1e9, lambda2=-1e9), total=None)) == 2
