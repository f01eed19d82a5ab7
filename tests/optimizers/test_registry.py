"""Methods by name, ours and a third party's; ranges of their hyper-parameters; the public surface of the package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import elastic_lsopt as lso
from elastic_lsopt.optimizers import registry

pytestmark = pytest.mark.fast
CLASSES = {
    "ae_sam": lso.AESAM, "asam": lso.ASAM, "bi_lora": lso.BiLoRA, "entropy_sgd": lso.EntropySGD, "esam": lso.ESAM,
    "flat_lora": lso.FlatLoRA,
    "friendly_sam": lso.FriendlySAM, "functional_sam": lso.FunctionalSAM, "gsam": lso.GSAM, "looksam": lso.LookSAM,
    "lpf_sgd": lso.LPFSGD, "m_sam": lso.MicroSAM, "momentum_sam": lso.MomentumSAM, "nbar": lso.NBAR, "none": lso.Plain,
    "random_sam": lso.RandomSAM, "rwp": lso.RWP, "sam": lso.SAM, "sampa": lso.SAMPa, "wsam": lso.WSAM,
}  # fmt: skip
OURS = sorted(CLASSES)


def test_names_and_classes() -> None:
    assert registry.names() == OURS
    assert {n: registry.get(n) for n in OURS} == CLASSES


def test_an_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(lso.UserError) as caught:
        registry.get("lpf-sgd")
    said = str(caught.value)
    assert "unknown method 'lpf-sgd'" in said and "did you mean 'lpf_sgd'?" in said and "\n" not in said
    assert all(n in said for n in OURS)
    with pytest.raises(lso.UserError, match="Known: ae_sam"):
        registry.get("zzz")


def test_a_method_is_a_frozen_keyword_only_dataclass() -> None:
    for name in OURS:
        method = registry.build(name)
        assert dataclasses.is_dataclass(method) and type(method).__dataclass_params__.frozen
        assert all(f.kw_only for f in dataclasses.fields(method)), name
        assert method.parts >= 1 and method == registry.build(name)


def test_defaults_are_the_papers() -> None:
    """Each method's own fields; what SAM's family shares is SAM's own, at which it is the paper's."""
    shared = {"every": 1, "radius": "model", "rho_scale": "none", "precondition": "none", "perturb": {}}
    sam = {"rho": 0.05, **shared}
    defaults = {name: dataclasses.asdict(registry.build(name)) for name in OURS}
    assert defaults == {
        "none": {}, "bi_lora": {"r": 8, "rho": 0.05}, "flat_lora": {"sigma": 0.05},
        "nbar": {"alpha": {"start": 0.5, "end": 0.0}},
        "sam": sam, "asam": {**sam, "rho": 0.5, "eta": 0.01},
        "gsam": {**sam, "alpha": 0.4}, "looksam": {**sam, "k": 5, "alpha": 0.7},
        "friendly_sam": {**sam, "sigma": 1.0, "decay": 0.9}, "wsam": {**sam, "gamma": 0.9, "decouple": True},
        "momentum_sam": {**sam, "rho": 0.3}, "m_sam": {**sam, "parts": 4}, "esam": {**sam, "beta": 0.5, "gamma": 0.5},
        "ae_sam": {**sam, "decay": 0.9, "lambda1": -1.0, "lambda2": 1.0},
        "sampa": {**sam, "rho": 0.1, "lam": 0.2, "halves": False},
        "random_sam": sam, "functional_sam": sam, "rwp": {"gamma": 0.01, "alpha": 0.5, "perturb": {}},
        "lpf_sgd": {"parts": 8, "gamma": 0.0005, "alpha": 15.0, "perturb": {}},
        "entropy_sgd": {
            "inner_steps": 5, "gamma0": 0.03, "gamma1": 0.001, "noise": 1e-4, "inner_lr": 0.1, "inner_momentum": 0.9,
            "average": 0.75, "batch": "parts",
        },
    }  # fmt: skip
    parts = {name: registry.build(name).parts for name in OURS}
    assert {n: p for n, p in parts.items() if p > 1} == {"lpf_sgd": 8, "m_sam": 4, "rwp": 2, "entropy_sgd": 5}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sam", {"rho": -0.1}, "rho=-0.1 must be a number >= 0"),
    ("sam", {"rho": float("nan")}, "rho=nan must be a number >= 0"),
    ("sam", {"rho": float("inf")}, "rho=inf must be a number >= 0"),
    ("sam", {"rho": "0.05"}, "rho='0.05' must be a number >= 0"),
    ("sam", {"every": 0}, "every=0 must be a whole number >= 1"),
    ("sam", {"every": 1.5}, "every=1.5 must be a whole number >= 1"),
    ("sam", {"radius": "layer"}, "radius='layer' must be model, parameter or row"),
    ("sam", {"rho_scale": "sqrt"}, "rho_scale='sqrt' must be none or sqrt_n"),
    ("sam", {"roh": 0.1}, "method 'sam' has no hyper-parameter 'roh'; did you mean 'rho'? It has: rho, every"),
    ("none", {"rho": 0.1}, "method 'none' has no hyper-parameter 'rho'; It has: none"),
    ("bi_lora", {"r": 0}, "r=0 must be a whole number >= 1"),
    ("bi_lora", {"rho": -0.1}, "rho=-0.1 must be a number >= 0"),
    ("bi_lora", {"rank": 4}, "method 'bi_lora' has no hyper-parameter 'rank'"),
    ("asam", {"rho": -1.0}, "rho=-1.0 must be a number >= 0"),
    ("asam", {"eta": -0.01}, "eta=-0.01 must be a number >= 0"),
    ("lpf_sgd", {"parts": 0}, "parts=0 must be a whole number >= 1"),
    ("lpf_sgd", {"parts": 2.5}, "parts=2.5 must be a whole number >= 1"),
    ("lpf_sgd", {"gamma": -1e-4}, "gamma=-0.0001 must be a number >= 0"),
    ("lpf_sgd", {"alpha": -1.0}, "alpha=-1.0 must be a number >= 0"),
]


@pytest.mark.parametrize("name,values,says", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_out_of_range(name: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        registry.build(name, **values)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_name_is_given_once() -> None:
    class Other:
        pass

    with pytest.raises(ValueError, match="'sam' is taken by SAM"):
        registry.register("sam")(Other)
    assert registry.register("sam")(lso.SAM) is lso.SAM
    assert registry.get("sam") is lso.SAM


@pytest.fixture
def third_party(tmp_path: Path) -> Path:
    """An installed distribution: a module, and the entry points that its wheel would have written."""
    (tmp_path / "theirs.py").write_text(
        "from dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Theirs:\n    strength: float = 1.0\n    parts = 1\n"
        "    def init(self, space): return {}\n    def gradient(self, space, oracle, state): return oracle.gradient()\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[elastic_lsopt.methods]\ntheirs = theirs:Theirs\nbroken = theirs:Nothing\n")
    return tmp_path


def python(code: str, *paths: Path) -> str:
    root = Path(__file__).resolve().parents[2]
    path = ":".join(str(p) for p in (*paths, root))
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_third_partys_method(third_party: Path) -> None:
    out = python(
        "import elastic_lsopt as lso\n"
        "print(lso.registry.names())\n"
        "print(lso.registry.build('theirs', strength=2.0))\n"
        "print(lso.registry.get('theirs') is lso.registry.get('theirs'))\n"
        "try:\n    lso.registry.get('broken')\nexcept lso.UserError as e:\n    print(e)\n",
        third_party,
    )
    names, built, same, broken = out.splitlines()
    assert names == str(sorted([*OURS, "theirs", "broken"]))
    assert built == "Theirs(strength=2.0)" and same == "True"
    assert "'broken'" in broken and "theirs:Nothing" in broken


@pytest.mark.long
def test_the_package_imports_no_framework() -> None:
    """The public names work without DeepSpeed, transformers, accelerate, Lightning, triton."""
    heavy = (
        "deepspeed", "transformers", "accelerate", "lightning", "triton", "datasets",
        "elastic_lsopt.space.random.noise_triton",
    )  # fmt: skip
    out = python(
        "import torch, sys\nbefore = set(sys.modules)\nimport elastic_lsopt as lso\n"
        "others = ('ProbeCallback', 'LandscapeTrainer', 'LandscapeTrainerMixin', 'LandscapeDeepSpeedStrategy')\n"
        "[getattr(lso, name) for name in lso.__all__ if name not in (*others, 'elastic')]\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])\n"
        "print('torch.distributed.fsdp' in set(sys.modules) - before)"
    )
    assert out.split() == ["[]", "False"]


def test_the_public_surface() -> None:
    """Adding a name is a decision; taking one away breaks users."""
    assert sorted(lso.__all__) == sorted(
        [
            *(kind.__name__ for kind in CLASSES.values()), "AdaHessian", "AdaptiveMemory", "Average", "EMA", "Engine",
            "LAMB", "LARS", "LAWA", "SWA", "LandscapeDeepSpeedStrategy", "LandscapeOptimizer", "LandscapeTrainer",
            "LandscapeTrainerMixin", "Loss", "MicroBatch", "Muon", "NonFinite", "PeerFailed", "ProbeCallback", "SASSHA",
            "SOAP", "Scales", "ScheduleFree", "SophiaG", "SophiaH", "StaleGeneration", "StaleGradient", "StaleWeights",
            "StepLoader", "StepReport", "Unsupported", "Update", "UpdateOptimizer", "UserError", "attach", "averages",
            "consensus", "elastic", "initialize", "join_replicas", "load", "probes", "registry", "save", "updates",
        ]
    )  # fmt: skip
    assert all(hasattr(lso, name) for name in lso.__all__)
    signatures = {
        lso.SAM: ["rho", "every", "radius", "rho_scale", "precondition", "perturb"],
        lso.ASAM: ["rho", "every", "radius", "rho_scale", "precondition", "perturb", "eta"],
        lso.LPFSGD: ["parts", "gamma", "alpha", "perturb"],
        lso.FlatLoRA: ["sigma"],
        lso.Plain: [],
    }
    for method, names in signatures.items():
        assert [f.name for f in dataclasses.fields(method)] == names
