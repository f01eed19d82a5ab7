"""The benchmarks of replicas at toy size, and that the one which looks for averages by halves would see one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.models import TOY
from benchmarks.replicas import deaths, few_bits, plain_steps, slow_link, streaming, traffic
from benchmarks.replicas.network import Links

full = pytest.mark.full
SMALL = replace(TOY, hidden=64, intermediate=128, vocabulary=256, layers=4)
needs_hosts = pytest.mark.skipif(Links.missing() is not None, reason=f"{Links.missing()}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("rule", "shape", "point", "how"),
    [
        ("local_sgd", "alone", "inside", "kill"), pytest.param("lsgd", "pair", "leading", "kill", marks=full),
        pytest.param("local_sgd", "alone", "midway", "kill", marks=full),
        pytest.param("lsgd", "alone", "led", "stop", marks=full),
    ],
)  # fmt: skip
def test_a_death_is_measured(rule: str, shape: str, point: str, how: str) -> None:
    told = deaths.once(rule, shape, point, how)
    # A kill may cost nothing beyond a usual turn: on a busy machine that is a long one.
    assert told["halves"] == [] and (how == "kill" or told["cost_s"] > 0.9 * deaths.DEADLINE_S), told


def look(*products: float, digest: str = "", samples: int = 4) -> dict[str, Any]:
    return {"products": [*products], "square": 1.0, "digest": digest, "samples": samples}


@pytest.mark.fast
def test_an_average_by_halves_is_seen() -> None:
    """Replicas of one rank at 0, 2 and 4 (along each direction), of which the second dies in the exchange."""
    at = {0: look(0.0, 0.0, 0.0, 0.0, digest="a"), 1: look(2.0, 2.0, 2.0, 2.0), 2: look(4.0, 4.0, 4.0, 4.0, digest="c")}
    whole, mean = look(2.0, 2.0, 2.0, 2.0, digest="m"), [5, [0, 1, 2], True]

    def said(met: list[Any], after: dict[int, dict[str, Any]]) -> list[list[dict[str, Any]]]:
        out = [[{"before": at[r]}] for r in range(3)]
        for r, weights in after.items():
            out[r].append({"turn": 6, "met": met, "weights": {"before": at[r], "after": weights}})
        return out

    kept = said([5, [0, 1, 2], False], {0: at[0], 2: at[2]})
    settled = said(mean, {0: whole, 2: whole})
    assert deaths.halves(kept, [1, 1, 1], "local_sgd") == deaths.halves(settled, [1, 1, 1], "local_sgd") == []
    for case, wrong in ((kept, look(0.0, 1.0, 0.0, 1.0, digest="h")), (settled, look(2.0, 1.0, 2.0, 2.0, digest="h"))):
        broken = copy.deepcopy(case)
        broken[2][-1]["weights"]["after"] = wrong
        assert len(deaths.halves(broken, [1, 1, 1], "local_sgd")) == 1


@pytest.mark.long
@full
@needs_hosts
def test_bytes_are_counted_on_the_wire() -> None:
    figures = traffic.measure([1, 1], "plain", ["local_sgd", "lsgd"], size=SMALL)
    for rule in ("local_sgd", "lsgd"):
        assert figures[f"{rule}_counted_of_paper"] == pytest.approx(1.0, abs=0.02)
        assert 1.0 < figures[f"{rule}_wire_of_paper"] < 2.0 and figures[f"{rule}_collectives"] == 1


@pytest.mark.long
@full
@pytest.mark.parametrize("kind", plain_steps.KINDS)
def test_a_step_between_exchanges(kind: str) -> None:
    figures = plain_steps.measure(kind, size="toy", pairs=2)
    assert all(figures[f"{rule}_{kind}_of_plain_step"] > 0 for rule in plain_steps.RULES)


@pytest.mark.long
@full
@needs_hosts
def test_what_is_hidden() -> None:
    figures = streaming.measure(blocks=2, size=SMALL)
    assert figures["streamed_step_s"] > 0 and figures["longest_exchange_s"] > 0


@pytest.mark.long
@full
@needs_hosts
def test_a_slow_link_and_a_replica_that_hangs() -> None:
    figures = slow_link.beside(SMALL, rounds=1, pairs=1)
    assert figures["8_samples_throughput_of_synchronous"] > 0
    assert figures["8_samples_bytes_of_synchronous"] == pytest.approx(1 / slow_link.TAU, rel=0.5)
    hung = slow_link.hang(SMALL, deadline_s=2.0, rounds=400)
    assert 0.3 < hung["hang_cost_of_deadline"] < 2.0, hung
    assert [0, 1, 2] in hung["hang_members"] and hung["hang_members"][-1] == [0, 1, 2, 3], hung


@pytest.mark.long
@full
def test_few_bits() -> None:
    figures = few_bits.compare("digits", [0, 1], max_steps=96)
    assert figures["digits_2_bits_bytes_of_synchronous"] < figures["digits_32_bits_bytes_of_synchronous"] <= 1 / 32
