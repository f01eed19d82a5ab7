"""`elastic-lsopt methods`: all that the registries know, with costs and tests; and a package that brings more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from elastic_lsopt.by_name import Registry
from elastic_lsopt.cli.main import main
from elastic_lsopt.cli.methods import REGISTRIES, TESTED, fields_of
from elastic_lsopt.config.settings import Optim
from elastic_lsopt.facts import Facts
from elastic_lsopt.updates.registry import updates
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from tests.cli.test_trust import JOB
from tests.processes.ranks import rank_environment
from tests.processes.warm import run

OURS = [(registry, name) for registry in REGISTRIES for name in registry.names() if registry.origin(name) is None]
COLUMNS = {"kind", "name", "summary", "paper", "passes", "memory", "communication", "needs", "tested"}


@pytest.mark.fast
@pytest.mark.parametrize(("registry", "name"), OURS, ids=[name for _, name in OURS])
def test_each_of_ours_says_what_it_costs_and_where_it_is_tested(registry: Registry, name: str) -> None:
    found = registry.get(name)
    assert isinstance(vars(found).get("facts"), Facts), f"{name} needs facts: see elastic_lsopt/facts.py"
    tested = json.loads(TESTED.read_text())[registry.kind]
    assert tested[name]["on"], "no test runs it on a backend; run: make manifest"
    assert all(Path(__file__).parents[2].joinpath(path).is_file() for path in tested[name]["in"])
    own = [f for f in fields_of(found) if f.name != "name"]
    assert all(f.meaning for f in own), "each field has a docstring"


@pytest.mark.fast
def test_the_settings_name_each_base() -> None:
    ours = [name for name in updates.names() if updates.origin(name) is None]
    assert sorted(get_args(Optim)) == sorted([*ours, *(kind.__name__.lower() for kind in ELEMENT_WISE)])


@pytest.mark.fast
def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["kind"], one["name"]) for one in listed] == [(registry.kind, name) for registry, name in OURS]
    assert all(one.keys() >= COLUMNS for one in listed)
    assert not [one["name"] for one in listed if one["summary"].startswith("Cost")], "what it is, then what it costs"
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    for one in listed:  # a pipe's lines are as long as they must be
        [row] = [line for line in table.splitlines() if line.split()[:1] == [one["name"]]]
        assert all(one[key] in row for key in COLUMNS - {"kind", "paper"}), one["name"]
    assert main(["methods", "lars"]) == 0
    whole = capsys.readouterr().out
    assert "arXiv 1708.03888, Algorithm 1" in whole and "trust: a number; default 0.001" in whole
    assert "c, the trust coefficient; >= 0." in whole and "optim_args: {momentum: 0.9, trust: 0.001}" in whole
    assert main(["methods", "lasr"]) == 2
    assert "is called 'lasr'; did you mean 'lars'? there are:" in capsys.readouterr().err


THEIRS = '''
"""Theirs: three algorithms of a package that is installed."""
from dataclasses import dataclass
import elastic_lsopt as lso

@dataclass(frozen=True, kw_only=True)
class Halved:
    """Half of the gradient."""
    share: float = 0.5
    """What is left of it."""
    parts = 1
    def init(self, space): return {}
    def gradient(self, space, oracle, state): return oracle.gradient().mul_(self.share)

@dataclass(frozen=True, kw_only=True)
class Signed(lso.Update):
    """The sign's step."""
    def update(self, space, gradient, state, rates):
        root = gradient.clone().abs_().add_(1e-30)
        space.weights.add_each_(gradient.div_(root), [-r for r in rates.lr])

@dataclass(frozen=True, kw_only=True)
class Last(lso.Average):
    """The weights as they are."""
    def init(self, space): return {"last": space.weights.clone()}
    def after_step(self, space, report, state): state["last"].copy_(space.weights)
    def weights(self, space, state): return state["last"]
'''
PROJECT = """
[project]
name = "theirs"
version = "1.0"
[project.entry-points."elastic_lsopt.methods"]
halved = "theirs:Halved"
gone = "theirs:Nothing"
[project.entry-points."elastic_lsopt.updates"]
signed = "theirs:Signed"
[project.entry-points."elastic_lsopt.averages"]
last = "theirs:Last"
[tool.setuptools]
py-modules = ["theirs"]
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
"""
IN_PYTHON = """
import torch, elastic_lsopt as lso
from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.cli.methods import in_full, known
[halved] = [one for one in known() if one.name == "halved"]
assert "share: a number; default 0.5\\n      What is left of it." in in_full(halved)
try:
    read_job("job.yaml", ["optim=singed"])
except lso.UserError as error:
    assert "unknown optim 'singed'; did you mean 'signed'?" in str(error)
from elastic_lsopt.api.json_base import base_of
assert lso.registry.build("halved", share=0.2).share == 0.2
model = torch.nn.Linear(3, 2)
start = model.weight.detach().clone()
base = lso.UpdateOptimizer(model.parameters(), "signed", lr=0.25)
engine = lso.Engine.of(model, base, method=lso.registry.build("halved"), keep=[lso.averages.build("last")],
                       loss_fn=lambda m, b: m(b).square().mean())
engine.train_batch([torch.randn(4, 3)])
torch.testing.assert_close((model.weight - start).abs(), torch.full_like(start, 0.25))
made = base_of({"type": "signed", "params": {"lr": 0.25}}, model)(list(model.parameters()))
assert made.param_groups[0]["update"] == "signed"
print("done")
"""


@pytest.mark.full
def test_a_package_that_is_installed_brings_its_own(tmp_path: Path) -> None:
    """By name: in the list, in a YAML, in a DeepSpeed JSON's optimizer block, in Python."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "theirs.py").write_text(THEIRS)
    (source / "pyproject.toml").write_text(PROJECT)
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-t", str(site)]
    done = subprocess.run([*install, str(source)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    environment = rank_environment() | {"PYTHONPATH": str(site)}

    def command(*arguments: str) -> Any:
        called = [sys.executable, "-m", "elastic_lsopt.cli.main", *arguments]
        return run(called, cwd=tmp_path, env=environment, timeout=180)

    listed = {one["name"]: one for one in json.loads(command("methods", "--json").stdout)}
    for name, kind in (("halved", "Halved"), ("signed", "Signed"), ("last", "Last")):
        assert listed[name]["announced_by"] == f"theirs: theirs:{kind}" and listed[name]["passes"] == "-"
    assert "does not load" in listed["gone"]["summary"]
    settings = JOB | {
        "model": {
            "import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 8, "classes": 10},
        },
        "output_dir": "run", "max_steps": 2, "eval_batches": 1, "optim": "signed", "averages": {"last": {}},
        "landscape": {"method": "halved", "share": 0.3}, "evaluate_average": "last", "export": False,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    done = command("train", "job.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run([sys.executable, "-c", IN_PYTHON], cwd=tmp_path, env=environment, timeout=120)
    assert done.stdout == "done\n", done.stderr[-3000:]
