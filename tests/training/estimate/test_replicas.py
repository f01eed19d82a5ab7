"""The plan of a job of replicas: each is a job on its share of ranks and batch, and the rule keeps Vectors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from tests.processes.ranks import ROOT

pytestmark = pytest.mark.fast
FILE = str(ROOT / "configs/quickstart.yaml")


def planned(capsys: pytest.CaptureFixture[str], world: int, *overrides: str) -> dict[str, Any]:
    assert main(["plan", FILE, *overrides, "--json", "--worlds", str(world)]) == 0
    [found] = json.loads(capsys.readouterr().out)["worlds"]
    return found


def test_a_replica_of_two_ranks_is_a_job_of_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Four ranks, two replicas, DiLoCo: two Vectors more, 1/2 of 705,664 elements of 4 bytes each."""
    apart = planned(capsys, 4, "consensus={rule: diloco, replicas: 2, tau: 50}")
    alone = planned(capsys, 2, "global_batch_size=16")
    vector = 4 * 705_664 // 2
    kept = apart["device_bytes"]["kept"]
    assert kept.pop("what consensus keeps") == 2 * vector
    assert kept == alone["device_bytes"]["kept"]
    assert apart["device_bytes"]["in_pass"] == alone["device_bytes"]["in_pass"]
    assert apart["sent_bytes_per_step"].pop("between replicas") == round(2 * (1 / 2) * vector / 50)
    assert apart["sent_bytes_per_step"] == alone["sent_bytes_per_step"]


def test_a_span_of_the_disagreement_is_a_vector_for_each_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    kept = planned(capsys, 4, "consensus={rule: diloco, replicas: 2, tau: 50, disagreement_span: 8}")
    assert kept["device_bytes"]["kept"]["what consensus keeps"] == (2 + 8) * 4 * 705_664 // 2


@pytest.mark.parametrize(
    ("block", "share"),
    [
        ("rule: lsgd", 3 / 4), ("rule: al_dsgd, graph: ring", 2 / 2),
        ("rule: diloco, exchange: {bits: 2}", 6 / 4 * 2.125 / 32),
        ("rule: sparseloco, exchange: {top_k: 64, bits: 2}", 3 * 64 / 4096 * (12 + 2.125) / 32),
    ],
)  # fmt: skip
def test_what_travels_between_replicas(capsys: pytest.CaptureFixture[str], block: str, share: float) -> None:
    """Of a Vector of 705,664 elements: the leader's to three others; a ring of four, half of whose edges are used; a
    sum of blocks of 256 with a scale; the 64 largest of 4096 to all, by place."""
    found = planned(capsys, 4, f"consensus={{{block}, replicas: 4, tau: 10}}", "workers=4")
    assert found["sent_bytes_per_step"]["between replicas"] == pytest.approx(share * 4 * 705_664 / 10, rel=2e-3)


def test_worlds_that_replicas_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", FILE, "consensus={rule: diloco, replicas: 4}", "workers=4", "--worlds", "6"]) == 2
    assert "consensus.replicas=4 must divide --worlds 6" in capsys.readouterr().err
