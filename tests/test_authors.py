"""What the pages on algorithms of one's own show runs together, by name, by import path in a YAML, and beside ours."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.test_trust import JOB
from tests.docs.blocks import blocks
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import run

PAGES = [f"docs/{name}.md" for name in ("authors", "own-method", "own-update", "own-probe")]
PROGRAM = "\n".join(block.text for page in PAGES for block in blocks(page) if block.title == "mine.py")
USED = """
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(2)]
loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
base = lso.UpdateOptimizer(model.parameters(), "clipped_sgd", lr=1.0)
keep = [lso.averages.build("late", begin=64)]
engine = lso.Engine.of(model, base, method=lso.registry.build("ascend_twice"), loss_fn=loss_fn, keep=keep)
start = [p.clone() for p in model.parameters()]
losses = [engine.train_batch(batches) for _ in range(20)]
assert engine.last_step.passes == 3 and losses[-1] < losses[0], losses
for p, before in zip(model.parameters(), start):
    assert 0 < (p - before).norm() < 20 * 0.1 + 1e-5
assert engine.families["averages/late"].state_dict()["count"] == 19  # from 64 samples on: the second step
with engine.averaged("late"):
    assert engine.evaluate([batches]) < losses[0]
space, oracle = lso.attach(engine, None, batches)
from elastic_lsopt.probes.catalogue import ProbeContext, measure
context = ProbeContext(space=space, oracle=oracle, batches=list, samples=32)
assert measure("slope", {"length": 0.001}).ask(context, length=0.001)["value"] > 0
print("done")
"""


def test_the_pages_programs_work_together(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", f"{PROGRAM}\n{USED}"], cwd=tmp_path, env=rank_environment(), timeout=120)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


def test_the_pages_own_checks_pass(tmp_path: Path) -> None:
    """All in one process; tests/docs/test_followed_pages.py types them one by one."""
    (tmp_path / "mine.py").write_text(PROGRAM)
    checks = [block for page in PAGES for block in blocks(page, "python") if block.title.startswith("check")]
    for check in checks:
        (tmp_path / check.title).write_text(check.text)
    program = f"import runpy\nfor check in {[check.title for check in checks]}:\n    runpy.run_path(check)"
    done = run([sys.executable, "-c", program], cwd=tmp_path, env=rank_environment(), timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stdout + done.stderr[-3000:]


def test_a_job_takes_them_by_import_path(tmp_path: Path) -> None:
    """All four kinds in one YAML, from a module beside it; `validate` imports nothing of it."""
    (tmp_path / "mine.py").write_text(f"{PROGRAM}\nfrom pathlib import Path\nPath('ran').touch()\n")
    settings = JOB | {
        "model": {
            "import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 8, "classes": 10},
        },
        "output_dir": "run", "max_steps": 3, "learning_rate": 0.5, "eval_batches": 2,
        "landscape": {"import": "mine:AscendTwice", "rho": 0.1}, "optim": "mine:ClippedSGD",
        "optim_args": {"most": 0.2}, "averages": {"late": {"import": "mine:Late", "begin": 8}},
        "evaluate_average": "late",
        "probes": {"slope": {"import": "mine:slope", "every_steps": 2, "length": 0.02, "units": 1}},
    }  # fmt: skip
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "elastic_lsopt.cli.main"]
    done = run([*command, "validate", str(job)], cwd=tmp_path, env=rank_environment(), timeout=120)
    assert done.returncode == 0 and "mine:AscendTwice was not imported" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()
    done = run([*command, "train", str(job)], cwd=tmp_path, env=rank_environment(), timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["passes"] for row in rows] == [3, 3, 3] and rows[1]["probes"]["slope"]["value"] > 0


@pytest.mark.fast
def test_every_door_of_the_pages_exists() -> None:
    import elastic_lsopt as lso

    doors = [door for page in PAGES for door in re.findall(r"`lso\.([A-Za-z.]+)", (ROOT / page).read_text())]
    assert len(doors) >= 12
    for door in doors:
        first, *more = door.split(".")
        assert first in lso.__all__, door
        found = getattr(lso, first) if more else lso
        for name in more:
            found = getattr(found, name)
            assert callable(found), door
