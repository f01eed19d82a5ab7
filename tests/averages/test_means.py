"""SWA and LAWA are the means of the weights that a plain loop takes, wherever they lie; their memory is counted."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from tests.laws.cover import full_but

KINDS = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
    *((f"zero{s}", w) for s in (0, 1, 2, 3) for w in (1, 2, 3)),
]
VECTORS = {"swa": 1.0, "lawa": 2.0}


@pytest.mark.parametrize("kind,world", full_but([("fsdp2", 3), ("zero1", 2), ("zero3", 2)], KINDS))
def test_swa_lawa_the_mean_of_what_a_plain_loop_takes(ranks: Any, kind: str, world: int) -> None:
    zero = kind.startswith("zero")
    close = {"mean": 2e-7, "loss": 1e-6} if zero else {"mean": 1e-12, "loss": 1e-12}
    for rank in ranks(world).run("tests.cases.averages:followed", kind=kind, dtype="fp32" if zero else "fp64"):
        assert rank["began late"] and rank["taken"][0] >= 2, rank
        for name, vectors in VECTORS.items():
            r = rank[name]
            assert r["mean"] < close["mean"] and r["loss"] < close["loss"] and r["back"] == 0.0, rank
            assert r["vectors"] == vectors and r["moved"] > 1e-5, rank


def space_of(value: float) -> ParameterSpace:
    model = nn.ParameterList([nn.Parameter(torch.tensor([value], dtype=torch.float64))])
    return ParameterSpace(Replicated(model.named_parameters(), None, model=model))


def passed(average: Any, batches: list[int], total: int | None = 1000) -> tuple[list[float], Any]:
    """Where the average lies after each step of a run whose weights are the committed samples."""
    space, clock = space_of(0.0), SampleClock(total_samples=total)
    state, out = average.init(space), []
    for batch in batches:
        clock = clock.advanced(batch)
        with torch.no_grad():
            space.weights.tensors[0].fill_(clock.samples)
        report = StepReport(0.0, 1, 0.0, batch, False, clock=clock)
        average.after_step(space, report, state)
        out.append(average.weights(space, state).tensors[0].item())
    return out, state


@pytest.mark.fast
def test_the_moments_follow_from_committed_samples() -> None:
    """Law 6: from 500 on, every 100 samples, in batches of 100, of 50, and of both."""
    swa, lawa = lso.SWA(start=0.5, every_samples=100), lso.LAWA(k=3, every_samples=100)
    for batches in ([100] * 10, [50] * 20, [100] * 6 + [50] * 8):
        means, state = passed(swa, batches)
        assert (means[-1], state["n"]) == (750.0, 6), batches
        assert passed(lawa, batches)[0][-1] == 900.0, batches
    assert passed(swa, [100] * 5)[0] == [100.0, 200.0, 300.0, 400.0, 500.0]
    # A step longer than a window ends one, not several.
    assert passed(lso.SWA(start=0.0, every_samples=10), [100, 5, 5, 90])[0] == [100.0, 100.0, 105.0, 410 / 3]


@pytest.mark.fast
def test_at_rest() -> None:
    """One weight taken is that weight; a queue of one holds the latest."""
    assert passed(lso.SWA(start=0.0, every_samples=1000), [7, 7, 7])[0] == [7.0] * 3
    assert passed(lso.LAWA(k=1), [7, 7, 7])[0] == [7.0, 14.0, 21.0]


@pytest.mark.fast
def test_a_resume_with_another_length_of_the_queue_has_the_latest() -> None:
    _, state = passed(lso.LAWA(k=4), [10] * 6)
    assert lso.LAWA(k=2).weights(space_of(0.0), state).tensors[0].item() == 55.0
    longer: Any = lso.LAWA(k=6)
    assert longer.weights(space_of(0.0), longer.init(space_of(9.0)) | state).tensors[0].item() == 45.0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("swa", {"start": 1.0}, "start=1.0 must be a number >= 0 and < 1"),
        ("swa", {"every_samples": 0}, "every_samples=0 must be a whole number >= 1"),
        ("lawa", {"k": 0}, "k=0 must be a whole number >= 1"),
        ("lawa", {"k": 2.5}, "k=2.5 must be a whole number >= 1"),
        ("lawa", {"start": -0.1}, "start=-0.1 must be a number >= 0 and < 1"),
    ],
)
def test_out_of_range(name: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(lso.UserError, match=said):
        lso.averages.build(name, **wrong)


@pytest.mark.fast
def test_a_share_of_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(lso.UserError, match=r"swa: 0.75 of the run is asked for, .* total_samples, or use 0"):
        passed(lso.SWA(), [8], total=None)
    assert passed(lso.LAWA(), [8], total=None)[0] == [8.0]


@pytest.mark.fast
def test_an_average_that_has_not_begun_is_the_weights_and_says_so(caplog: Any) -> None:
    weights = nn.Linear(3, 1)
    engine = lso.Engine.of(
        weights, torch.optim.SGD(weights.parameters(), lr=0.1), loss_fn=lambda m, b: m(b).square().mean(),
        keep=[lso.SWA(start=0.5), lso.LAWA()], total_samples=64,
    )  # fmt: skip
    logging.getLogger("elastic_lsopt").propagate = True
    with caplog.at_level("WARNING"):
        for _ in range(2):
            with engine.averaged("swa"):
                assert engine.evaluate([[torch.ones(2, 3)]]) > 0
    said = [r.getMessage() for r in caplog.records]
    assert sum(line.startswith("average swa has taken no weights yet") for line in said) == 1
    before = [p.clone() for p in weights.parameters()]
    with engine.averaged("lawa"):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, weights.parameters(), strict=True))


@pytest.mark.fast
def test_statistics_of_batch_norm_are_estimated_at_the_average() -> None:
    """As docs/papers.md says it: those that the mean of the weights makes of the batches; the weights return."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    batches = [torch.randn(16, 4) for _ in range(4)]
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)  # type: ignore[arg-type]
    optimizer = lso.LandscapeOptimizer(base, lso.Plain(), samples_per_step=16, keep=[lso.SWA(start=0.0)])
    points = []
    for x in batches:

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        points.append([p.detach().clone() for p in model[0].parameters()])
    weight, bias = (torch.stack(of).mean(0) for of in zip(*points, strict=True))
    kept, before = {n: b.clone() for n, b in model.named_buffers()}, [p.clone() for p in model.parameters()]
    with optimizer.averaged("swa"):
        torch.optim.swa_utils.update_bn(batches, model)
        wanted = torch.stack([(x @ weight.T + bias).mean(0) for x in batches]).mean(0)
        torch.testing.assert_close(model[1].running_mean, wanted)
    for n, buffer in model.named_buffers():
        buffer.copy_(kept[n])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
