"""Each example runs and says what it claims."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import BIN, run

LIMIT_S = 240.0
"""Against one that hangs: they take 5 to 60 s on two quiet cores, and several times that on busy ones."""


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example(example: Path) -> None:
    start = [sys.executable, str(example)]
    if example.name == "consensus_own_loop.py":
        start = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(example)]
    done = run(start, cwd=ROOT, env=rank_environment(), timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    if example.name.startswith("with_"):
        epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
        losses = [float(line.split()[3].rstrip(",")) for line in epochs]
        assert len(epochs) == 10 and all(line.endswith("16 steps of 2 passes") for line in epochs), done.stdout
        assert losses[-1] < 0.5 * losses[0], losses
    if example.name == "consensus_own_loop.py":
        assert done.stdout.startswith("4 exchanges of 2 replicas, the last 0."), done.stdout
    if example.name == "own_method.py":
        plain, own, sam = done.stdout.splitlines()
        assert "passes a step 1" in plain and "passes a step 1" in own and "passes a step 2" in sam
        assert all(float(line.rsplit(" ", 1)[1]) > 0.85 for line in (plain, own, sam))
    if example.name == "curvature_on_shards.py":
        whole, sharded = (
            [float(x) for x in line.split()[1:4]]
            for line in done.stdout.splitlines()
            if line.startswith(("whole", "sharded"))
        )
        assert whole == pytest.approx(sharded, abs=2e-5) and whole[0] > whole[1] > whole[2] > 0
        assert done.stdout.count("bytes of eigenvectors") == 2
    if example.name == "elastic_demo.py":
        assert "kill -9 to node n2" in done.stdout and "joined: n4" in done.stdout, done.stdout
        worlds, largest = done.stdout.splitlines()[-2:]
        assert " -> 2" in worlds and " 3" in worlds, worlds
        assert float(largest.rsplit(" ", 1)[1]) <= 1e-5, largest
