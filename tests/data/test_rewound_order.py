"""After a rewind the rest comes in another order, each sample once per epoch, the same on all ranks and resumes."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.data.order import SampleOrder
from elastic_lsopt.data.rewound_order import rewound

pytestmark = pytest.mark.fast


@settings(max_examples=60)
@given(n=st.integers(1, 40), rewinds=st.lists(st.integers(0, 90), max_size=3), seed=st.integers(0, 2**64 - 1))
def test_each_sample_comes_once_per_epoch_and_what_is_used_up_stays(n: int, rewinds: list[int], seed: int) -> None:
    order = SampleOrder(n, seed)
    found = rewound(order, rewinds, range(4 * n))
    assert all(sorted(found[e * n : (e + 1) * n].tolist()) == list(range(n)) for e in range(4))
    past = min(rewinds, default=4 * n)
    assert np.array_equal(found[:past], order.at(range(4 * n))[:past])


def test_every_rewind_gives_another_order() -> None:
    order = SampleOrder(1000, 4)
    orders = [rewound(order, [100] * k, range(100, 3000)) for k in range(4)]
    for a in range(4):
        for b in range(a):
            same = (orders[a] == orders[b]).reshape(29, 100).mean(axis=1)
            assert same.max() < 0.1  # in the rest of this epoch and in all later ones


def loader(rank: int = 0, world: int = 1) -> StepLoader:
    return StepLoader(
        list(range(50)), list, global_batch_size=8, microbatch_size=2, seed=4, rank=rank, world=world, total_samples=160
    )


def samples(units: list[Any]) -> list[int]:
    return [x for unit in units if not unit.idle for x in unit.batch]


@pytest.mark.parametrize("undone_at", [6, 20])
def test_a_running_iterator_goes_on_from_the_rewound_cursor(undone_at: int) -> None:
    """Also where the rewind comes after the last step."""
    ours, saved, found = loader(), {}, []
    for step, units in enumerate(ours, 1):
        found.append(samples(units))
        ours.commit(8)
        if step == 4:
            saved = ours.state_dict()
        if step == undone_at:
            ours.rewind(saved, undone_at - 4)
            del found[4:]
    assert len(found) == 20 and ours.committed == 160 and ours.rewinds == 1
    straight = [samples(units) for units in loader_steps(loader())]
    assert found[:4] == straight[:4] and found[4:] != straight[4:]
    assert all(sorted([*chain(*found)][e : e + 50]) == list(range(50)) for e in (0, 50, 100))

    resumed = [loader(rank, 2) for rank in range(2)]
    for each in resumed:
        each.load_state_dict(ours.state_dict() | {"committed": 48})
        assert each.rewinds == 1
    both = [[*chain(*map(samples, units))] for units in zip(*map(loader_steps, resumed), strict=True)]
    assert [sorted(step) for step in both] == [sorted(step) for step in found[6:]]


def loader_steps(each: StepLoader) -> Any:
    return islice(each, 20)
