"""What a rule of consensus refuses, in one line with the fix: values out of range, and replicas that lack something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import elastic_lsopt as lso
from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.cli.methods import in_full, known
from elastic_lsopt.consensus import registry
from elastic_lsopt.consensus.needs import refuse_unmet
from tests.cases import engines, updates
from tests.cli.test_trust import JOB
from tests.processes.ranks import ROOT

OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    *((rule, {"tau": 0}, "tau=0 must be a whole number >= 1") for rule in registry.names() if "streaming" not in rule),
    *((rule, {"pull": 1.5}, "pull=1.5 must be a number >= 0 and <= 1")
      for rule in ("local_sgd", "dppf", "lsgd", "mgrawa", "lgrawa")),
    ("lgrawa", {"pull": -0.1}, "pull=-0.1 must be"), ("easgd", {"tau": 2.5}, "tau=2.5 must be a whole number"),
    ("local_sgd", {"pull": "0.5"}, "pull='0.5' must be a number"),
    ("easgd", {"beta": 1.1}, "beta=1.1 must be a number >= 0 and <= 1, beyond which the centre is not stable"),
    ("dppf", {"push": -1.0}, "push=-1.0 must be"), ("mgrawa", {"decay": 1.0}, "decay=1.0 must be"),
    ("mgrawa", {"norms": "stale"}, "norms='stale' must be fresh or training"),
    ("lsgd", {"prox": 2}, "prox=2 must be"), ("lsgd", {"window": 0}, "window=0 must be"),
    ("lsgd", {"global_every": 4}, "global_every=4 must be 1 where group=1: there are no local leaders"),
    ("al_dsgd", {"graph": "star"}, "graph='star' must be one of ring, exponential, complete"),
    ("al_dsgd", {"budget": 0}, "budget=0 must be a number > 0 and <= 1"),
    ("al_dsgd", {"c1": 0.8, "c2": 0.4}, r"c1, c2=\(0.8, 0.4\) must be numbers >= 0 whose sum is <= 1"),
    ("diloco", {"lr": 0}, "lr=0 must be a number > 0"), ("diloco", {"momentum": 1.0}, "momentum=1.0 must be"),
    ("sparseloco", {"decay": 1.5}, "decay=1.5 must be"), ("parle", {"rho1": -1}, "rho1=-1 must be"),
    ("streaming_diloco", {"tau": 30}, "tau=30 must be a multiple of fragments=4, whose exchanges are tau / fragments"),
    ("streaming_diloco", {"tau": 0}, "tau=0 must be a whole number >= 1"),
    ("streaming_diloco", {"tau": 8, "overlap": 2}, "overlap=2 must be less than tau / fragments = 2, or a"),
    ("streaming_diloco", {"fragments": 0}, "fragments=0 must be"), ("streaming_diloco", {"alpha": 2}, "alpha=2 must"),
    ("easgd", {"bta": 0.5}, "rule of consensus 'easgd' has no hyper-parameter 'bta'; did you mean 'beta'?"),
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("rule,hyper,line", OUT_OF_RANGE, ids=[f"{r[0]}-{next(iter(r[1]))}" for r in OUT_OF_RANGE])
def test_values_out_of_range_are_refused(rule: str, hyper: dict[str, Any], line: str) -> None:
    with pytest.raises(lso.UserError, match=line) as raised:
        registry.build(rule, **hyper)
    assert "\n" not in str(raised.value)


@pytest.mark.fast
def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(lso.UserError, match="unknown rule of consensus 'dilocco'; did you mean 'diloco'"):
        registry.build("dilocco")


def base(name: str) -> torch.optim.Optimizer:
    params = [*engines.net().named_parameters()]
    return updates.ours(name)(params) if name in updates.UPDATES else engines.optimizer(name)(params)


PAPERS = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
MLP = "elastic_lsopt.training.classifiers:mlp"
UNMET: list[tuple[str, str, str, dict[str, Any], str]] = [
    (
        "parle",
        "sam",
        "sgd",
        {},
        "parle needs the method entropy_sgd, and the method is sam; set landscape: {",
    ),
    ("lsam", "none", "sgd", {}, "lsam needs the method sam, and the method is none; set landscape: {method: sam}"),
    (
        "muloco",
        "none",
        "momentum",
        {},
        "muloco needs the update muon, and the base is SGD; set optim: muon",
    ),
    ("muloco", "none", "lamb", {}, "muloco needs the update muon, and the base is lamb; set optim: muon"),
    (
        "eamsgd",
        "none",
        "sgd",
        {},
        "eamsgd needs a base with momentum, and the base is SGD with momentum=0; set",
    ),
    (
        "sparseloco",
        "none",
        "adamw",
        {},
        "sparseloco tells the largest parts alone, and this exchange tells all",
    ),
    (
        "lsgd",
        "none",
        "sgd",
        {"bits": 8},
        "lsgd sends replicas' own points, which are not rounded, and exch",
    ),
    ("al_dsgd", "none", "sgd", {"bits": 2, "top_k": 64}, "al_dsgd sends replicas' own points.*exchange has top_k=64"),
]
MET: list[tuple[str, str, str, dict[str, Any]]] = [
    ("parle", "entropy_sgd", "sgd", {}), ("lsam", "sam", "adamw", {}), ("muloco", "none", "muon", {}),
    ("eamsgd", "none", "momentum", {}), ("eamsgd", "sam", "adamw", {}), ("eamsgd", "none", "lars", {}),
    ("sparseloco", "none", "adamw", {"top_k": 64, "bits": 2}), ("easgd", "asam", "sgd", {"bits": 2}),
    ("local_sgd", "none", "sgd", {"bits": 2, "top_k": 64}), ("lsgd", "none", "sgd", {}),
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(
    "rule,method,of,more,line", UNMET, ids=lambda v: v if isinstance(v, str) and " " not in v else ""
)
def test_what_replicas_lack_is_refused(rule: str, method: str, of: str, more: dict[str, Any], line: str) -> None:
    with pytest.raises(lso.UserError, match=f"rule of consensus {line}") as raised:
        refuse_unmet(registry.build(rule), method, base(of), **more)
    assert "\n" not in str(raised.value)


@pytest.mark.fast
@pytest.mark.parametrize("rule,method,of,more", MET, ids=[f"{row[0]}-{row[2]}" for row in MET])
def test_what_a_rule_needs_is_enough(rule: str, method: str, of: str, more: dict[str, Any]) -> None:
    refuse_unmet(registry.build(rule), method, base(of), **more)


@pytest.mark.fast
def test_each_needs_is_told_where_costs_are() -> None:
    """What the class enforces and what `elastic-lsopt methods` prints."""
    for name in registry.names():
        rule = registry.get(name)
        needs = bool(rule.needs_method or rule.needs_update or rule.needs_momentum or rule.needs_top_k)
        assert needs == bool(rule.facts.needs), name
        assert rule.needs_method in rule.facts.needs and rule.needs_update in rule.facts.needs


@pytest.mark.parametrize("name", registry.names())
def test_the_example_of_each_is_a_job_that_has_what_it_needs(name: str, tmp_path: Path) -> None:
    """What `elastic-lsopt methods NAME` prints."""
    [one] = [one for one in known() if one.name == name]
    shown = yaml.safe_load(in_full(one).partition("In a job's YAML:")[2])
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump({**JOB, "global_batch_size": 32, "model": {"import": MLP}, "output_dir": "run", **shown})
    )
    read_job(file)
    rule, exchange = registry.get(name), shown["consensus"].get("exchange", {})
    assert shown.get("landscape", {}).get("method", "") == rule.needs_method
    assert not rule.needs_update or shown["optim"] == rule.needs_update
    assert not rule.needs_momentum or shown["momentum"] > 0
    assert rule.needs_top_k == ("top_k" in exchange)


@pytest.mark.fast
@pytest.mark.parametrize("name", registry.names())
def test_each_has_its_paper_on_the_page(name: str) -> None:
    """The entry names the rule, links its file and its paper as the class says it."""
    rule = registry.get(name)
    [entry] = [part for part in PAPERS.split("\n## ") if f"`rule: {name}`" in part.partition("\n")[0]]
    assert rule.facts.paper.rpartition("arXiv ")[2] in entry
    assert f"(../{rule.__module__.replace('.', '/')}.py)" in entry
