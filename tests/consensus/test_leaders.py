"""Laws of the rules that follow a leader, or a neighbour: ties, windows of losses, matchings; in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.consensus import registry
from elastic_lsopt.consensus.al_dsgd import active, edges, matchings
from tests.cases.together import at, meet
from tests.consensus.test_laws import random_points, report, with_losses


def test_a_leader_is_unmoved_and_draws_the_others() -> None:
    rule = registry.build("lsgd", pull=0.3, prox=0.0)
    points = random_points(3)
    members = at(rule, *points)
    with_losses(rule, members, [0.5, 0.2, 0.9])
    found = meet(rule, members)
    assert torch.equal(found[1], points[1])
    for i in (0, 2):
        assert float((found[i] - (0.7 * points[i] + 0.3 * points[1])).abs().max()) <= 1e-15


def test_ties_go_to_the_lowest_number() -> None:
    """By number, whatever the places: replicas 3, 5 and 8."""
    rule = registry.build("lsgd", pull=1.0, prox=0.0)
    members = at(rule, *random_points(3))
    with_losses(rule, members, [0.2, 0.1, 0.1])
    second = members[1].x
    assert all(torch.equal(x, second) for x in meet(rule, members, numbers=[3, 5, 8]))


def test_the_leader_is_whose_mean_loss_is_lowest() -> None:
    """Over the last two steps: 0.9, (0.1, 0.7) and 0.5."""
    rule = registry.build("lsgd", pull=1.0, prox=0.0, window=2)
    members = at(rule, *random_points(3))
    for losses in ([0.0, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.7, 0.5]):
        with_losses(rule, members, losses)
    second = members[1].x
    assert all(torch.equal(x, second) for x in meet(rule, members))


def test_who_has_not_trained_leads_nobody() -> None:
    rule = registry.build("lsgd", pull=0.5)
    members, points = at(rule, *random_points(3)), random_points(3)
    assert all(map(torch.equal, meet(rule, members), points)), "nobody has trained: nobody moves"
    rule.after_step(members[2].space, report(7.0), members[2].state)
    meet(rule, members)
    assert torch.equal(members[2].x, points[2]) and not torch.equal(members[0].x, points[0])


def test_leaders_of_nodes_and_of_all() -> None:
    """Two nodes of two: each third exchange is among all."""
    rule = registry.build("lsgd", pull=1.0, prox=0.0, group=2, global_every=3)
    points = random_points(4)
    members = at(rule, *points)
    with_losses(rule, members, [0.4, 0.3, 0.1, 0.2])
    assert all(map(torch.equal, meet(rule, members, 0), [points[i] for i in (1, 1, 2, 2)]))
    assert all(torch.equal(x, points[2]) for x in meet(rule, members, 2))


@pytest.mark.parametrize("rule", ["lsgd", "al_dsgd"])
def test_a_rule_that_goes_by_the_loss_refuses_a_method_without(rule: str) -> None:
    made = registry.build(rule)
    [member] = at(made, [1.0])
    with pytest.raises(lso.UserError, match=rf"{rule} goes by the replicas' losses, and this method's step has none"):
        made.after_step(member.space, report(math.nan), member.state)


# -- AL-DSGD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["ring", "exponential", "complete"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_matchings_are_all_edges_once_and_none_meet(graph: Any, size: int) -> None:
    parts = matchings(edges(graph, size))
    assert sorted(edge for part in parts for edge in part) == edges(graph, size)
    assert all(len({i for edge in part for i in edge}) == 2 * len(part) for part in parts)
    degrees = {sum(i in edge for edge in edges(graph, size)) for i in range(size)}
    assert len(degrees) == 1, "each replica has as many neighbours"
    if graph == "complete":
        assert len(edges(graph, size)) == size * (size - 1) // 2


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_exchanges_use_the_budget(size: int, budget: float) -> None:
    """In the mean, and each matching as often as any other."""
    parts, rounds = matchings(edges("ring", size)), 40 * len(matchings(edges("ring", size)))
    used = [active("ring", size, budget, number) for number in range(rounds)]
    for part in parts:
        assert sum(part[0] in now for now in used) == pytest.approx(budget * rounds, abs=1)


def test_d_psgd_keeps_the_mean() -> None:
    rule = registry.build("al_dsgd", budget=1.0, c1=0.0, c2=0.0, p1=0.0, p2=0.0)
    points = random_points(5)
    members = at(rule, *points)
    with_losses(rule, members, [0.3, 0.1, 0.2, 0.5, 0.4])
    start, spread = sum(points) / 5, max(float(p.norm()) for p in points)
    found = points
    for k in range(60):
        found = meet(rule, members, k)
        assert float((sum(found) / 5 - start).abs().max()) <= 1e-14
    assert max(float((x - start).norm()) for x in found) <= 1e-6 * spread


def test_al_dsgd_of_a_ring() -> None:
    """(1-p1-p2)(1-c1-c2) W x + [(1-p1-p2) c1 + p1] x_B + [(1-p1-p2) c2 + p2] x_D, where D is i: all have two."""
    rule = registry.build("al_dsgd", budget=1.0, c1=0.3, c2=0.1, p1=0.2, p2=0.15)
    x = random_points(4)
    members = at(rule, *x)
    with_losses(rule, members, [0.4, 0.1, 0.1, 0.2])
    best = [1, 1, 2, 2]  # of itself and its two neighbours; a tie of 1 and 2 goes to itself
    for i, found in enumerate(meet(rule, members)):
        mixed = (x[i] + x[(i + 1) % 4] + x[(i - 1) % 4]) / 3
        wanted = 0.65 * 0.6 * mixed + (0.65 * 0.3 + 0.2) * x[best[i]] + (0.65 * 0.1 + 0.15) * x[i]
        assert float((found - wanted).abs().max()) <= 1e-15


def test_al_dsgd_goes_to_the_better_of_two_and_leaves_equals_alone() -> None:
    rule = registry.build("al_dsgd", budget=1.0, c1=1.0, c2=0.0, p1=0.0, p2=0.0)
    members = at(rule, *random_points(2))
    with_losses(rule, members, [0.5, 0.4])
    second = members[1].x
    assert all(float((x - second).abs().max()) <= 1e-15 for x in meet(rule, members))
    rule = registry.build("al_dsgd", budget=1.0)
    members = at(rule, *[random_points(1)[0]] * 4)
    with_losses(rule, members, [0.3, 0.1, 0.2, 0.5])
    assert all(float((x - random_points(1)[0]).abs().max()) <= 1e-15 for x in meet(rule, members))
