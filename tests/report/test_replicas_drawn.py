"""The picture of replicas that have come apart, and of a job's other replicas: against the files' own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from elastic_lsopt.report.pictures import draw_disagreement as disagreement
from elastic_lsopt.report.run import Run
from tests.report.synthetic import exchanged, steps, write_run

pytestmark = pytest.mark.fast


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []
    monkeypatch.setattr(disagreement, "save", lambda figure, target: figures.append(figure))
    return figures


def labelled(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


def test_curves_are_the_rows(drawn: list[Any], tmp_path: Path) -> None:
    rows = exchanged(steps(40, 20))
    others = {1: exchanged(steps(40, 20), seed=1)}
    words = disagreement.draw_disagreement(Run("run", rows, replicas=others), tmp_path)
    losses, distances, shares = drawn[0].axes
    met = [(row["samples"], row["exchange"]) for row in rows if "exchange" in row]
    assert len(met) == 4
    assert labelled(distances)["consensus distance"] == [(at, e["consensus_distance"]) for at, e in met]
    assert labelled(distances)["valley width"] == [(at, e["valley_width"]) for at, e in met]
    of_each = [line.get_ydata().tolist() for line in distances.lines[:4]]
    assert of_each == [[e["distances"][member] for _, e in met] for member in range(4)]
    assert labelled(shares)["share of its gradient"] == [(at, e["gradient_share"]) for at, e in met]
    second = [line for line in shares.lines if line.get_color() == shares.lines[0].get_color()][1]
    assert second.get_ydata().tolist() == [
        row["exchange"]["gradient_share"] for row in others[1] if "exchange" in row
    ]  # fmt: skip
    assert labelled(shares)["of the span, in top eigenvectors"] == [(640.0, 0.3), (1280.0, 0.3)]
    assert sum(len(line.get_xdata()) == 40 for line in losses.lines) == 2, "a loss for each replica"
    assert words is not None and words.startswith("At the last of 4 exchanges: consensus distance 0.")
    assert "effective rank 2.7 of 3" in words and "(by chance 4e-05)" in words


def test_an_exchange_that_this_replica_has_missed_is_told_by_another(drawn: list[Any], tmp_path: Path) -> None:
    whole = exchanged(steps(40, 50))
    missed = [{k: v for k, v in row.items() if k != "exchange" or row["step"] != 20} for row in whole]
    assert disagreement.draw_disagreement(Run("run", missed, replicas={1: whole}), tmp_path) is not None
    assert len(labelled(drawn[0].axes[1])["consensus distance"]) == 4
    # A job that was started again counts its exchanges anew.
    again = [row | {"exchange": row["exchange"] | {"number": 1}} if "exchange" in row else row for row in whole]
    assert disagreement.draw_disagreement(Run("run", again, replicas={1: again}), tmp_path) is not None
    assert len(labelled(drawn[1].axes[1])["consensus distance"]) == 4


def test_without_a_span_there_are_two_panels_and_without_exchanges_none(drawn: list[Any], tmp_path: Path) -> None:
    rows = exchanged(steps(40, 50))
    for row in rows:
        row.get("exchange", {}).pop("gradient_share", None)
    assert disagreement.draw_disagreement(Run("run", rows), tmp_path) is not None
    assert len(drawn[0].axes) == 2
    assert disagreement.draw_disagreement(Run("run", steps(40, 50)), tmp_path) is None


def test_the_report_of_a_job_knows_its_replicas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the settings name: a folder of an earlier job with more of them is none of its own."""
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)
    folder = write_run(tmp_path / "run", rows=exchanged(steps(40, 50)))
    (folder / "config.yaml").write_text("consensus: {rule: easgd, replicas: 3}\n")
    for number in (1, 2, 3):
        write_run(folder / f"replica-{number}", rows=exchanged(steps(40, 50), seed=number))
    meeting = {
        "event": "exchange", "number": 2, "members": [0, 2], "fit": [0, 2], "missing": [1], "well": True,
        "samples": 640, "time": 5.0,
    }  # fmt: skip
    for name in (".", "replica-2"):
        (folder / name / "journal.jsonl").write_text(json.dumps(meeting) + "\n")
    assert main(["report", str(folder)]) == 0
    assert f"{folder}/pictures/disagreement.png" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "3 replicas" in page and "At the last of 4 exchanges" in page
    (folder / "replica-2" / "metrics.jsonl").write_text("[3]\n[4]\n")
    assert main(["report", str(folder)]) == 2
    assert "replica-2/metrics.jsonl is damaged" in capsys.readouterr().err
