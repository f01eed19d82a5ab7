"""The reference of the measures follows from the catalogue, and a job takes what it shows."""

from __future__ import annotations

import re

import pytest
import yaml

from elastic_lsopt.probes.catalogue import OURS
from elastic_lsopt.probes.reference import PAGE, measures_text
from elastic_lsopt.training.probing.during_training import WINDOW, check_probes

pytestmark = pytest.mark.fast

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \| (.*)\|$", TEXT, re.M)


def test_the_page_is_fresh() -> None:
    assert measures_text() == TEXT, "run: make schema"


def test_a_job_takes_each_with_its_settings() -> None:
    assert {name for name, _, _ in ROWS} == {*OURS, "trajectory"}
    for name, settings, needs in ROWS:
        if not needs.startswith(("a study", "`elastic-lsopt probe")):
            given = {k: v for k, v in yaml.safe_load(settings).items() if v is not None}
            check_probes({name: {"every_steps": 1, **given}})


def test_some_defaults_by_hand() -> None:
    told = {name: yaml.safe_load(settings) for name, settings, _ in ROWS}
    assert told["lpf"] == {"sigma": 0.01, "draws": 100, "normalised": False}
    assert told["adaptive_sharpness_linf"]["rho"] == 0.01 and told["trajectory"]["window"] == WINDOW
    assert told["top_eigenvalues"]["k"] == 5 and told["lambda_max"]["k"] == 1
