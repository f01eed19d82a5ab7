"""A command whose output is lost says so in one line, or nothing where its reader has gone; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes.ranks import rank_environment

pytestmark = pytest.mark.fast
SCHEMA = [sys.executable, "-m", "elastic_lsopt.cli.main", "schema"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("to", ["a full disk", "a reader that has gone"])
def test_output_that_is_lost(to: str, unbuffered: str) -> None:
    if to == "a full disk":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        read, stream = os.pipe()
        os.close(read)
    try:
        ended = subprocess.run(
            SCHEMA, env={**rank_environment(), "PYTHONUNBUFFERED": unbuffered}, text=True, stdout=stream,
            stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(stream)
    said = "elastic-lsopt: the output could not be written: No space left on device.\n" if to == "a full disk" else ""
    assert (ended.returncode, ended.stderr) == (1, said)
