"""A wrong `consensus` block is refused in one line with the place, the value and the fix, before a worker starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from tests.jobs import command, run, write_job

RIGHT: dict[str, Any] = {"rule": "local_sgd", "replicas": 2, "tau": 4}
BASE: dict[str, Any] = {"backend": "replicated", "workers": 2, "global_batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("block", "changes", "expected"),
    [
        ({"replicas": 1}, {}, r"consensus\.replicas=1 must be greater than or equal to 2"),
        ({"replicas": 3}, {}, r"consensus\.replicas=3 must divide global_batch_size=8"),
        ({"replicas": 2}, {"workers": 3}, r"consensus\.replicas=2 must divide workers=3"),
        ({"replicas": 8}, {"workers": 8}, r"global_batch_size=8 is 1 for each of 8 replicas, less than .*=2"),
        ({"rule": "local_sdg"}, {}, r"unknown rule of consensus 'local_sdg'; did you mean 'local_sgd'"),
        ({"tau": 0}, {}, r"consensus: tau=0 must be a whole number >= 1"),
        ({"pull": 1.5}, {}, r"consensus: pull=1\.5 must be a number >= 0 and <= 1"),
        ({"pul": 0.5}, {}, r"'local_sgd' has no hyper-parameter 'pul'; did you mean 'pull'"),
        ({"exchange": {"bits": 3}}, {}, r"consensus\.exchange\.bits=3 must be 32, 16, 8, 4 or 2"),
        ({"exchange_timeout_s": 0}, {}, r"consensus\.exchange_timeout_s=0 must be greater than 0"),
        ({"disagreement_span": -1}, {}, r"consensus\.disagreement_span=-1 must be greater than or equal to 0"),
        ({"rule": "parle", "tau": 1}, {}, r"parle needs the method entropy_sgd, and the method is sam"),
        ({"rule": "muloco"}, {}, r"muloco needs the update muon, and the base is SGD"),
        ({"rule": "eamsgd"}, {"momentum": 0.0}, r"eamsgd needs a base with momentum"),
        ({"rule": "sparseloco"}, {}, r"sparseloco .* set exchange: \{top_k: 64, bits: 2\}"),
        ({"rule": "lsgd", "exchange": {"bits": 4}}, {}, r"lsgd sends replicas' own points"),
        ({}, {"on_divergence": "rewind"}, r"on_divergence=rewind with consensus is not supported"),
        ({}, {"lr_scheduler_type": "autodrop", "warmup_ratio": 0.0}, r"autodrop with consensus is not supported"),
    ],
)  # fmt: skip
def test_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], block: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    file = write_job(folder / "wrong.yaml", **{**BASE, **changes}, consensus={**RIGHT, **block})
    assert main(["validate", str(file), "--trust"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"wrong\.yaml:\d+: .*" + expected, said) and said.count("\n") == 1, said


def test_a_launcher_with_another_number_of_ranks(folder: Path) -> None:
    file = write_job(folder / "three.yaml", **BASE, consensus=RIGHT)
    said = run(command("torchrun", file, world=3), folder, code=1)
    assert said.count("consensus.replicas=2 must divide the 3 rank(s) of the job; start 4 of them") == 1, said
    assert "elastic_lsopt/training" not in said, "no traceback"
