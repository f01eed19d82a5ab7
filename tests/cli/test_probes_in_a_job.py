"""Probes during training: on time, within their budget, the same at every world size, without a trace in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import elastic_lsopt as lso
from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.config.probes import ProbeConfig
from tests.jobs import LLAMA, command, losses, rows, run, write_job

PROBES: dict[str, Any] = {
    "lambda_max": {"every_steps": 4, "budget": 1.0, "tolerance": 1.0e-3},
    "trace_of_a_layer": {
        "measure": "trace", "every_samples": 21, "budget": 1.0, "samples": 3, "parameters": "model.layers.0.*",
    },
    "edge_of_stability": {"every_steps": 8, "budget": 1.0},
    "noise_scale": {"every_steps": 8, "budget": 1.0},
    "trajectory": {"every_steps": 4, "budget": 1.0, "align": 2},
    "rare": {"measure": "gradient_norm", "every_steps": 1, "budget": 1.0e-6},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same job: with probes on one worker and on two, and without."""
    folder = tmp_path_factory.mktemp("probes")
    out = {}
    for name, more in (
        ("one", {"probes": PROBES, "workers": 1, "backend": "replicated"}),
        ("two", {"probes": PROBES, "report_to": ["tensorboard"]}),
        ("without", {}),
    ):
        run(command("none", write_job(folder / f"{name}.yaml", model=LLAMA, eval_steps=None, **more)), folder)
        out[name] = folder / name
    return out


def measured(folder: Path, name: str) -> dict[int, Any]:
    return {step: row["probes"][name] for step, row in rows(folder).items() if name in row.get("probes", {})}


def test_each_at_its_steps(runs: dict[str, Path]) -> None:
    assert list(measured(runs["two"], "lambda_max")) == [4, 8]
    assert list(measured(runs["two"], "trace_of_a_layer")) == [3, 6]  # 7 samples a step
    assert list(measured(runs["two"], "trajectory")) == [4, 8]
    assert list(measured(runs["two"], "rare")) == [1], "a budget of a millionth is used up by the first measurement"


def test_the_run_is_what_it_is_without_probes(runs: dict[str, Path]) -> None:
    assert losses(runs["two"]) == losses(runs["without"])


def test_the_same_numbers_at_one_worker_and_two(runs: dict[str, Path]) -> None:
    for name, key in (("lambda_max", "eigenvalues"), ("trace_of_a_layer", "value"), ("edge_of_stability", "value"),
                      ("noise_scale", "value"), ("trajectory", "path_length"), ("rare", "value")):  # fmt: skip
        one, two = measured(runs["one"], name), measured(runs["two"], name)
        assert one and one.keys() == two.keys()
        for step in one:
            assert two[step][key] == pytest.approx(one[step][key], rel=2e-3), (name, step)


def test_the_edge_is_of_the_rate_and_momentum(runs: dict[str, Path]) -> None:
    """The schedule has ended at 0 by the last step's rate: the threshold is 2 (1 + 0.9) / that step's own."""
    last = rows(runs["one"])[8]
    assert last["probes"]["edge_of_stability"]["threshold"] == pytest.approx(2 * 1.9 / last["lr"])


def test_the_updates_beside_the_sharpest_directions(runs: dict[str, Path]) -> None:
    one, two = (measured(runs[name], "trajectory") for name in ("one", "two"))
    for step in one:
        for what in ("update_alignment", "gradient_alignment"):
            assert 0 <= one[step][what]["share"] <= 1
            assert two[step][what]["share"] == pytest.approx(one[step][what]["share"], abs=5e-3)


def test_tensorboard_has_the_numbers(runs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs["two"] / "tensorboard")).Reload()
    found = [e.value for e in events.Scalars("probes/lambda_max/eigenvalues/0")]
    wanted = [result["eigenvalues"][0] for result in measured(runs["two"], "lambda_max").values()]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "probes,says",
    [
        ({"lambda_mx": {"every_steps": 1}}, "unknown measure 'lambda_mx'; did you mean 'lambda_max'?"),
        ({"trace": {"every_steps": 1, "sample": 3}}, "no setting 'sample'; did you mean 'samples'?"),
        ({"trace": {"every_step": 1}}, "exactly one of every_steps and every_samples"),
        ({"trace": {"every_steps": 1, "every_samples": 2}}, "exactly one of every_steps and every_samples"),
        ({"trace": {"every_steps": 0}}, "probes.trace.every_steps=0 must be greater than or equal to 1"),
        ({"trace": {"every_steps": 1, "budget": 2.0}}, "probes.trace.budget=2.0 must be less than or equal to 1"),
        ({"trajectory": {"every_steps": 1, "k": 2}}, "the trajectory's settings are window"),
    ],
)
def test_wrong_probes_are_one_line(tmp_path: Path, probes: Any, says: str) -> None:
    with pytest.raises(lso.UserError) as raised:
        read_job(write_job(tmp_path / "job.yaml", probes=probes))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert "job.yaml" in str(raised.value)


@pytest.mark.fast
def test_due_by_samples_does_not_depend_on_the_batch() -> None:
    probe = ProbeConfig(measure="trace", every_samples=100)
    for batch in (7, 50, 130):
        passed = [s + batch for s in range(0, 1300, batch) if probe.due((s // batch, s), (s // batch + 1, s + batch))]
        wanted = {-(-point // batch) * batch for point in range(100, passed[-1] + 1, 100)}  # the step that reaches it
        assert passed == sorted(wanted), batch


def test_a_measure_that_fails_ends_nothing(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", probes={"trace": {"every_steps": 4, "units": 10_000}}, workers=1,
                    backend="replicated")  # fmt: skip
    said = run(command("none", job), tmp_path)
    assert "probe trace gave nothing after step 4: units=10000" in said
    lines = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[3]["probes"] == {"trace": None}
