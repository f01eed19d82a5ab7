"""How far replicas are apart, as an exchange tells it at known points: sharded or not, by any rule, in any share."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.cases.disagreement import WEIGHED
from tests.laws.cover import full_but

RULES = ["local_sgd", "diloco", "easgd", "dppf", "mgrawa", "lgrawa", "lsgd", "al_dsgd", "streaming_diloco"]
DAILY = [
    ("fsdp2", [2, 1], ["diloco", "lgrawa", "lsgd", "streaming_diloco"]), ("ddp", [1, 1, 1], ["local_sgd", "easgd"]),
]  # fmt: skip
ALL = [
    (kind, sizes, RULES)
    for kind, sizes in [
        ("ddp", [1, 1, 1]), ("ddp", [2, 1]), ("fsdp2", [2, 1]), ("fsdp2", [1, 3]), ("zero1", [1, 2]), ("zero2", [2, 2]),
        ("zero3", [2, 1]),
    ]
]  # fmt: skip


def exchanges(ranks: Any, kind: str, sizes: list[int], rules: list[str], **more: Any) -> list[tuple[str, Any]]:
    """(rule, what was told and what is right) of each rank, rule and exchange."""
    of_ranks = ranks(sum(sizes)).run("tests.cases.disagreement:met", kind=kind, sizes=sizes, rules=rules, **more)
    return [(of_rule["rule"], e) for of_rule in itertools.chain(*of_ranks) for e in of_rule["exchanges"]]


def off(e: dict[str, Any]) -> float:
    """How far the inner products are from the right ones, of the largest."""
    wanted = np.array(e["wanted_gram"])
    return float(np.abs(np.array(e["gram"]) - wanted).max() / wanted.max())


@pytest.mark.parametrize("kind,sizes,rules", full_but(DAILY, [*DAILY, *ALL]), ids=str)
def test_at_known_points(ranks: Any, kind: str, sizes: list[int], rules: list[str]) -> None:
    """Inner products of the differences, and the share of each replica's next gradient in the span of its last two."""
    dtype, limit = ("fp32", 1e-4) if kind.startswith("zero") else ("fp64", 1e-9)
    for rule, e in exchanges(ranks, kind, sizes, rules, dtype=dtype):
        assert off(e) <= limit, (rule, e)
        span = e["span"]
        assert span["span"] == e["rank"], (rule, e)
        assert span["gradient_share_by_chance"] == pytest.approx(e["rank"] / e["numbers"])
        if rule not in WEIGHED:
            assert span["gradient_share"] == pytest.approx(e["wanted_share"], rel=10 * limit), (rule, e)
        assert (e["chosen"] < e["parameters"]) == (rule == "streaming_diloco")


def test_in_few_bits_only_what_rounding_leaves_is_told(ranks: Any) -> None:
    """Of 8 bits to a percent; of 2 nothing, unless a span is asked for, which is worth a reduction of its own."""
    told = {
        (bits, span): exchanges(ranks, "ddp", [1, 1, 1], ["diloco"], bits=bits, span=span)
        for bits, span in ((8, 0), (2, 0), (2, 2))
    }
    assert all(1e-6 < off(e) < 0.02 for _, e in told[8, 0])
    assert all(e["gram"] is None and e["span"] == {} for _, e in told[2, 0])
    assert [e["after"] for _, e in told[2, 0]] == [e["after"] for _, e in told[2, 2]], "and changes nothing else"
    for _, e in told[2, 2]:
        assert off(e) <= 1e-9 and e["span"]["gradient_share"] == pytest.approx(e["wanted_share"], rel=1e-8)
