"""Breadth-first search of the commit rule alone: every order of work, kills and generations, up to a number of steps.

Membership is reduced to what its own search shows: a generation that leaves a worker out comes after its death. So a
worker may die, and hear of a generation, at any point; a generation is made of those alive, and of the newcomers.
States visited: 2 workers, 2 kills, 2 steps: 836; 2 and a newcomer, 1 kill, 1 step: 31,217; 3 workers, 2 kills, 1 step:
12,583. Marked full: 2 workers, 6 steps: 94,744; 2 and a newcomer, 2 steps: 179,014; 3 workers, 2 steps: 60,237;
4 workers, 1 kill, 1 step: 32,378. That the real machine keeps its side is tested in test_membership_random.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.elastic.membership.commit_rule import Job, Rule, RuleBroken

pytestmark = pytest.mark.fast
SOUND = Rule()
Node = tuple[Job, int, tuple[str, ...], int]
"""The job, the newest generation, its ranks, and the kills that may still come."""


def following(node: Node, steps: int) -> Iterator[Node]:
    job, newest, ranks, kills = node
    alive = {t.name for t in job.trainers}
    for t in job.trainers:
        after = [job.enter(t.name, newest, ranks), job.push(t.name)]
        if t.phase not in ("train", "reduce") or t.step < steps:
            after.append(job.act(t.name))
        yield from ((then, newest, ranks, kills) for then in after if then is not job)
        if kills and len(alive) > 1:
            yield job.living(alive - {t.name}), newest, ranks, kills - 1
    if alive != {*ranks}:
        yield job, newest + 1, (*(r for r in ranks if r in alive), *sorted(alive.difference(ranks))), kills


def search(workers: int, newcomers: int, kills: int, steps: int, rule: Rule = SOUND) -> set[Node]:
    """All that can follow when `workers` start a job."""
    names = "abcd"[: workers + newcomers]
    first: Node = (Job(rule=rule).living(names), 1, tuple(names[:workers]), kills)
    seen: set[Node] = {first}
    level = [first]
    while level:
        level = [then for at in level for then in following(at, steps) if not (then in seen or seen.add(then))]
    return seen


full = pytest.mark.full


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "newcomers", "kills", "steps"),
    [
        (2, 0, 2, 2),
        (2, 1, 1, 1),
        (3, 0, 2, 1),
        pytest.param(2, 0, 2, 6, marks=full),
        pytest.param(2, 1, 1, 2, marks=full),
        pytest.param(3, 0, 2, 2, marks=full),
        pytest.param(4, 0, 1, 1, marks=full),
    ],
)
@pytest.mark.timeout(1800)
def test_nothing_committed_is_lost_or_done_twice(workers: int, newcomers: int, kills: int, steps: int) -> None:
    seen = search(workers, newcomers, kills, steps)
    jobs = [job for job, _, _, _ in seen]
    print(f"{workers} workers, {newcomers} newcomers, {kills} kills, {steps} steps: {len(seen)} states")
    assert max(job.committed[1] for job in jobs) == steps, "steps are committed"
    assert max(job.committed[0] for job in jobs) > 1, "also by later generations"
    assert any(job.lost for job in jobs) == (workers > 2 and kills == 2), (
        "only a rank and its mirror together are a loss"
    )


def test_committing_the_largest_acknowledged_version_is_caught() -> None:
    with pytest.raises(RuleBroken, match="was dropped"):
        search(3, 0, 1, 2, Rule(smallest=False))


@pytest.mark.long
def test_dropping_old_versions_before_the_new_are_mirrored_is_caught() -> None:
    with pytest.raises(RuleBroken, match="was dropped"):
        search(2, 1, 1, 1, Rule(keep_until_mirrored=False))
