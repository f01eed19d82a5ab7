"""How far replicas are apart against closed forms, and the span of a replica's differences at known points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_lsopt import UserError
from elastic_lsopt.oracle.family import Kept
from elastic_lsopt.probes.noise.disagreement import Disagreement, DisagreementSpan
from elastic_lsopt.space.basis import Basis
from tests.cases.probes.flatness import dense, quadratic, vector

pytestmark = pytest.mark.fast
N = 8
DOUBLE = torch.float64


def of(points: Tensor) -> Disagreement:
    apart = points - points.mean(0)
    return Disagreement(apart @ apart.T)


def test_two_replicas() -> None:
    """At a distance d of each other each is d / 2 from the mean, in one direction."""
    found = of(torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 1.0]], dtype=DOUBLE))
    assert found.distances == pytest.approx([2.5, 2.5])
    assert found.consensus_distance == found.valley_width == pytest.approx(2.5)
    assert found.shares == pytest.approx([1.0]) and found.effective_rank == pytest.approx(1.0)


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_corners_of_a_simplex_differ_in_every_direction(replicas: int) -> None:
    """Points r e_i: |x_i - m|^2 = r^2 (1 - 1/R), and R - 1 directions of equal strength."""
    found = of(3.0 * torch.eye(replicas, dtype=DOUBLE))
    assert found.consensus_distance == pytest.approx(3.0 * math.sqrt(1 - 1 / replicas))
    assert found.valley_width == pytest.approx(found.consensus_distance)
    assert found.shares == pytest.approx([1 / (replicas - 1)] * (replicas - 1))
    assert found.effective_rank == pytest.approx(replicas - 1)


def test_one_that_is_away_from_the_others() -> None:
    """Three alike and one at a: |a| 3/4 from the mean and |a| / 4: root mean square sqrt(3) / 4, mean 3/8, of |a|."""
    found = of(torch.tensor([[0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0, 0.0, 8.0, 0.0]], dtype=DOUBLE))
    assert found.distances == pytest.approx([2.0, 2.0, 2.0, 6.0])
    assert found.consensus_distance == pytest.approx(8 * math.sqrt(3) / 4) and found.valley_width == pytest.approx(3.0)
    assert found.effective_rank == pytest.approx(1.0)


def test_directions_of_known_strength() -> None:
    """Points on two axes, +-a and +-b: eigenvalues 2 a^2 and 2 b^2; p = a, b over their sum."""
    a, b = 3.0, 1.0
    found = of(torch.tensor([[a, 0.0], [-a, 0.0], [0.0, b], [0.0, -b]], dtype=DOUBLE))
    assert found.shares == pytest.approx([0.9, 0.1])
    assert found.effective_rank == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_replicas_that_are_alike_and_numbers_that_are_none() -> None:
    told = of(torch.ones(3, 2, dtype=DOUBLE)).to_json()
    assert told == {
        "consensus_distance": 0.0, "valley_width": 0.0, "distances": [0.0] * 3, "shares": [], "effective_rank": 0.0,
    }  # fmt: skip
    assert of(torch.tensor([[0.0], [math.inf]], dtype=DOUBLE)).to_json() == {}
    many = of(torch.eye(20, dtype=DOUBLE)).to_json()
    assert len(many["shares"]) == 8 and len(many["distances"]) == 20


# -- the span ----------------------------------------------------------------------------------------------------------


class Drifted:
    """A span over the last K exchanges of a replica in N dimensions, at known differences."""

    def __init__(self, exchanges: int, dtype: torch.dtype = DOUBLE) -> None:
        h, w, c = (t.to(dtype) for t in dense(N))
        self.space, self.oracle = quadratic(h, w, c)
        self.kind = DisagreementSpan(exchanges)
        self.kept = Kept(self.kind, self.space)
        self.state: dict[str, Any] = self.kept.state

    def exchange(self, *gap: float) -> None:
        self.kind.keep(self.state, self.vector(gap))

    def vector(self, values: Any) -> Any:
        return vector(self.space, {"w": torch.tensor([*values, *[0.0] * (N - len(values))], dtype=self.space.dtype)})

    def step(self, *gradient: float) -> dict[str, Any]:
        self.kind.before_step(self.space, self.vector(gradient), 1, self.state)
        return self.kind.told(self.space, self.state)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_the_share_of_a_gradient_of_known_direction(dtype: torch.dtype) -> None:
    """Differences along e_1 and e_1 + e_2 span a plane; of a gradient (2, 3, 6) of length 7 13/49 lies in it."""
    drifted = Drifted(3, dtype)
    drifted.exchange(5.0)
    assert drifted.step(2.0, 3.0, 6.0) == {
        "span": 1, "gradient_share": pytest.approx(4 / 49), "gradient_share_by_chance": 1 / 8,
    }  # fmt: skip
    drifted.exchange(0.001, 0.001)
    assert drifted.step(2.0, 3.0, 6.0) == {
        "span": 2, "gradient_share": pytest.approx(13 / 49), "gradient_share_by_chance": 2 / 8,
    }  # fmt: skip
    drifted.exchange(7.0, 1.0)  # in the plane
    assert drifted.step(2.0, 3.0, 6.0)["span"] == 2
    assert drifted.step(0.0, 0.0, 6.0)["gradient_share"] == pytest.approx(13 / 49), "once per exchange"


def test_the_oldest_goes_first() -> None:
    drifted = Drifted(2)
    for gap in ([1.0], [0.0, 1.0], [0.0, 0.0, 1.0]):
        drifted.exchange(*gap)
    assert drifted.step(1.0)["gradient_share"] == pytest.approx(0.0)
    drifted.exchange(1.0)
    assert drifted.step(1.0, 1.0, 1.0)["gradient_share"] == pytest.approx(2 / 3)


def test_what_cannot_be_said_is_not() -> None:
    drifted = Drifted(2)
    assert drifted.step(1.0) == {}, "no exchange yet"
    drifted.exchange(0.0)
    assert drifted.step(1.0) == {}, "no difference"
    drifted.exchange(1.0)
    assert drifted.step(0.0) == {}, "no gradient"
    drifted.exchange(0.0, 1.0)
    assert drifted.step(0.0, 1.0) != {}
    drifted.exchange(1.0, 1.0)
    assert drifted.kind.told(drifted.space, drifted.state) == {}, "no step since"
    with pytest.raises(UserError, match=r"^exchanges=0 must be a whole number >= 1"):
        DisagreementSpan(0)


def test_a_fragment_alone_differs() -> None:
    """What is not of the fragment has not differed at that exchange, whatever was in its place before."""
    drifted = Drifted(1)
    drifted.exchange(*[1.0] * N)
    drifted.kind.keep(drifted.state, drifted.vector([0.0, 2.0]), within=lambda whole: whole)
    assert drifted.step(3.0, 4.0)["gradient_share"] == pytest.approx(16 / 25)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_resumed_with_another_length(before: int, after: int) -> None:
    one, two = Drifted(before), Drifted(after)
    for gap in ([1.0], [0.0, 1.0], [0.0, 0.0, 1.0]):
        one.exchange(*gap)
    two.kept.load_state_dict(one.kept.state_dict())
    two.exchange(0.0, 0.0, 0.0, 2.0)
    told = two.step(0.0, 0.0, 1.0, 1.0)
    assert told["span"] == after and told["gradient_share"] == pytest.approx(1.0), "the newest stay"
    assert len([name for name in two.state if name.startswith("gap/")]) == after


def test_beside_eigenvectors() -> None:
    """Differences 3 e_1 and 4 (e_2 + e_3) / sqrt 2, eigenvectors e_1, e_2, e_8."""
    drifted = Drifted(4)
    top = Basis(drifted.space, 3)
    for i in (0, 1, 7):
        top.append(drifted.vector(torch.eye(N)[i].tolist()))
    assert drifted.kind.beside(drifted.space, drifted.state, top) == {}
    drifted.exchange(3.0)
    drifted.exchange(0.0, math.sqrt(8), math.sqrt(8))
    assert drifted.kind.beside(drifted.space, drifted.state, top) == {
        "span": 2, "span_share": pytest.approx((1 + 0.5) / 2), "span_share_by_chance": 3 / 8,
        "eigenvector_shares": pytest.approx([1.0, 0.5, 0.0]), "eigenvector_share_by_chance": 2 / 8,
        "energy_share": pytest.approx((9 + 8) / (9 + 16)),
    }  # fmt: skip
