"""Run tests and note which lines and branches they take, for whom, in every process that they start.

python -m tests.mutation.coverage_run [pytest's arguments]     # into .mutation/coverage
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.mutation.contexts import ROOT

FOLDER = ROOT / ".mutation"
DATA = FOLDER / "coverage"
SETTINGS = """[run]
branch = True
source = {root}/elastic_lsopt
data_file = {data}
parallel = True
sigterm = True
patch = subprocess, fork, _exit
plugins = tests.mutation.contexts
disable_warnings = no-data-collected, module-not-imported, module-not-measured
"""


def main(arguments: list[str]) -> int:
    """Returns pytest's exit code. Data of an earlier run is kept, and added to."""
    FOLDER.mkdir(exist_ok=True)
    settings = FOLDER / "coverage.ini"
    settings.write_text(SETTINGS.format(root=ROOT, data=DATA), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    coverage = [sys.executable, "-m", "coverage"]
    tested = subprocess.run(
        [*coverage, "run", f"--rcfile={settings}", "-m", "pytest", *arguments], check=False, cwd=ROOT, env=environment
    )
    subprocess.run([*coverage, "combine", "-q", "-a", f"--rcfile={settings}"], check=False, cwd=ROOT, env=environment)
    report = ["report", f"--rcfile={settings}", "--precision=1", "--skip-covered", "--sort=cover"]
    subprocess.run([*coverage, *report], check=False, cwd=ROOT, env=environment)
    return tested.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
