"""Other libraries stay out of a job's log, unless the user asks for them; reports of a load come from one rank."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastic_lsopt.training.reporting import quiet
from tests.processes.ranks import ROOT, rank_environment

pytestmark = pytest.mark.fast
WARNS = """
import warnings
from elastic_lsopt.training.reporting.quiet import silence_libraries
silence_libraries()
warnings.warn("a function of another library will be renamed", FutureWarning)
from huggingface_hub.utils import are_progress_bars_disabled
print(are_progress_bars_disabled())
"""


@pytest.mark.parametrize(("asked", "shown"), [("", False), ("default", True)])
def test_warnings_of_other_libraries(asked: str, shown: bool) -> None:
    environment = rank_environment() | {"PYTHONWARNINGS": asked}
    ended = subprocess.run(
        [sys.executable, "-c", WARNS], cwd=ROOT, env=environment, text=True, capture_output=True, check=True
    )
    assert ("will be renamed" in ended.stderr) == shown
    assert ended.stdout == "True\n"


def test_loads_are_reported_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    monkeypatch.setenv(quiet.VERBOSITY, "warning")  # it is put back afterwards
    try:
        quiet.report_loads(False)
        assert logging.get_verbosity() == logging.ERROR
        quiet.report_loads(True)
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)
