"""Law 1 over combinations: method x backend x world x accumulation x clipping."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import FAMILY, METHODS, SHARDINGS, Combination, pairs, pairwise, product

SEED = 20261123
COVER = [*pairwise(product(), SEED), *pairwise(product(FAMILY, SHARDINGS), SEED)]
EVERYTHING = product((*METHODS, *FAMILY))
PARTS = {"lpf_sgd": "parts", "m_sam": "parts", "entropy_sgd": "inner_steps"}
PASSES = {
    "sam": 2, "asam": 2, "gsam": 2, "friendly_sam": 2, "wsam": 2, "m_sam": 2, "sampa": 2, "functional_sam": 2,
    "esam": 1.5, "looksam": 1, "ae_sam": None,
}  # fmt: skip
"""Of the last step: looksam's is none of its k-th, ae_sam's depends on the gradients; all others take one."""


def holds(ranks: Any, c: Combination) -> None:
    """fp32 within 1e-6 of the paper's loop after 6 steps on uneven units."""
    units = max(c.accumulation * c.world, 2 if c.method == "rwp" else 1)
    more = {PARTS[c.method]: min(3, units)} if c.method in PARTS else {}
    for rank, r in enumerate(
        ranks(c.world).run(
            "tests.cases.laws:reference", kind=c.kind, method=c.method, units=units, last=2, clip=c.clip, more=more
        )
    ):
        assert r["dw"] <= 1e-6, f"rank {rank}: {r}"
        assert r["dloss"] <= 1e-6, f"rank {rank}: {r}"
        assert PASSES.get(c.method, 1) in (None, r["passes"]), f"rank {rank}: {r}"


def test_the_cover_holds_every_pair() -> None:
    for everything in (product(), product(FAMILY, SHARDINGS)):
        assert set().union(*(pairs(c) for c in everything)) <= set().union(*(pairs(c) for c in COVER))
    assert len(COVER) < len(EVERYTHING) / 4


@pytest.mark.parametrize("combination", COVER, ids=str)
def test_pairwise(ranks: Any, combination: Combination) -> None:
    holds(ranks, combination)


@pytest.mark.full
@pytest.mark.parametrize("combination", [c for c in EVERYTHING if c not in COVER], ids=str)
def test_full_product(ranks: Any, combination: Combination) -> None:
    holds(ranks, combination)
