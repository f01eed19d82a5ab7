"""Law 1 over combinations: method x backend x world x accumulation x clipping."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import Combination, pairs, pairwise, product

SEED = 20261123
COVER = pairwise(product(), SEED)


def holds(ranks: Any, c: Combination) -> None:
    """fp32 within 1e-6 of the paper's loop after 6 steps on uneven units."""
    units = c.accumulation * c.world
    more = {"parts": min(3, units)} if c.method == "lpf_sgd" else {}
    for rank, r in enumerate(
        ranks(c.world).run(
            "tests.cases.laws:reference", kind=c.kind, method=c.method, units=units, last=2, clip=c.clip, more=more
        )
    ):
        assert r["dw"] <= 1e-6, f"rank {rank}: {r}"
        assert r["dloss"] <= 1e-6, f"rank {rank}: {r}"
        assert r["passes"] == (2 if "sam" in c.method else 1), f"rank {rank}: {r}"


def test_the_cover_holds_every_pair() -> None:
    everything = set().union(*(pairs(c) for c in product()))
    assert set().union(*(pairs(c) for c in COVER)) == everything
    assert len(COVER) < len(product()) / 4


@pytest.mark.parametrize("combination", COVER, ids=str)
def test_pairwise(ranks: Any, combination: Combination) -> None:
    holds(ranks, combination)


@pytest.mark.full
@pytest.mark.parametrize("combination", [c for c in product() if c not in COVER], ids=str)
def test_full_product(ranks: Any, combination: Combination) -> None:
    holds(ranks, combination)
