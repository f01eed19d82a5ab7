"""`lso.initialize`: where method, base and clipping come from, and what a mistake says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.api.initialize import clipping
from elastic_lsopt.api.json_base import base_of
from tests.processes import warm
from tests.processes.ranks import ROOT, rank_environment

SAM_IN_JSON = {
    "type": "sam",
    "params": {"rho": 0.3, "base": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.001}}},
}


def test_the_json_says_all(ranks: Any, tmp_path: Path) -> None:
    """A file with method, base and clipping gives the same weights as the arguments."""
    config = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "optimizer": SAM_IN_JSON,
        "train_batch_size": "auto",
    }
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(config))
    assert ranks(2).run("tests.cases.zero.initialize:file_equals_arguments", path=str(path)) == [0.0, 0.0]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=rank_environment(**environment), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_without_a_launcher_it_is_one_process() -> None:
    code = """
import torch, elastic_lsopt as lso
model = torch.nn.Linear(4, 2)
engine = lso.initialize(model=model, config={"zero_optimization": {"stage": 3}}, method=lso.SAM(),
                        base=lambda params: torch.optim.AdamW(params, lr=1e-2),
                        loss_fn=lambda m, b: m(b).square().mean())
x = torch.ones(8, 4)
print("losses", engine.train_batch([x]) > engine.train_batch([x]))
"""
    out = warm.run([sys.executable, "-c", code], cwd=ROOT, env=rank_environment(), timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().splitlines()[-1] == "losses True"
    assert "untested" not in out.stdout + out.stderr


def test_without_deepspeed_the_message_says_what_to_install() -> None:
    code = """
import sys; sys.modules["deepspeed"] = None
import torch, elastic_lsopt as lso
try:
    lso.initialize(model=torch.nn.Linear(2, 2), config={}, base=torch.optim.SGD, loss_fn=lambda m, b: m(b).sum())
except lso.UserError as error:
    print(error)
"""
    out = run(code)
    assert out.stdout.strip() == "lso.initialize needs DeepSpeed, which is not installed: pip install deepspeed."


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"method": lso.SAM(), "config": {"optimizer": SAM_IN_JSON}}, "the method is given twice"),
        ({"base": torch.optim.SGD, "config": {"optimizer": SAM_IN_JSON}}, "the base is given twice"),
        ({"config": {"optimizer": {"type": "sam", "params": {"rho": 0.1}}}}, "no base optimizer"),
        (
            {"config": {"optimizer": {"type": "sam", "params": {"roh": 0.1}}}},
            "no hyper-parameter 'roh'; did you mean 'rho'",
        ),
        ({"config": {"optimizer": {"type": "OneBitAdam"}}}, "optimizer.type='OneBitAdam' is neither a method"),
        ({"config": {}}, "no base optimizer"),
        ({"config": "no/such/file.json"}, "no/such/file.json does not exist"),
        ({"config": {"fp16": {"enabled": True}}}, "fp16 is refused"),
    ],
)
def test_a_contradiction_is_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        lso.initialize(model=torch.nn.Linear(2, 2), **arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_that_does_not_suit(ranks: Any) -> None:
    for what, words in (
        ("no_optimizer", "base gave a dict"),
        ("leaves_out", "parameter tiny is trainable but in no group"),
        ("needs_shapes", "Adafactor needs whole parameters and ZeRO stage 2"),
        ("bad_parameter", "does not suit torch.optim.SGD"),
        ("nothing_to_train", "no trainable parameter"),
        ("json_value", "DeepSpeed refuses the JSON: reduce_bucket_size=-5: Input should be greater than 0"),
    ):
        [said] = ranks(1).run("tests.cases.zero.initialize:mistake", what=what)
        assert words in said


@pytest.mark.fast
def test_clipping() -> None:
    assert clipping(None, None) == 0.0
    assert clipping("auto", 0.5) == 0.5
    assert clipping(1.0, None) == clipping(1.0, 1.0) == 1.0
    assert clipping(0, None) == 0.0
    for in_json, argument in ((1.0, 0.5), (-1, None), (None, float("nan")), ("much", None), (True, None)):
        with pytest.raises(lso.UserError):
            clipping(in_json, argument)


@pytest.mark.fast
def test_the_base_of_a_json() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    w = model.weight
    made = base_of(
        {"type": "adam", "params": {"lr": 0.1, "betas": [0.8, 0.9], "torch_adam": True, "weight_decay": "auto"}},
        model,
    )([w])
    assert type(made) is torch.optim.AdamW  # DeepSpeed's Adam decouples weight decay
    assert made.param_groups[0]["lr"] == 0.1 and tuple(made.param_groups[0]["betas"]) == (0.8, 0.9)
    assert type(base_of({"type": "Adam", "params": {"adam_w_mode": False}}, model)([w])) is torch.optim.Adam
    assert type(base_of({"type": "SGD", "params": {"lr": 0.5}}, model)([w])) is torch.optim.SGD
    with pytest.raises(lso.UserError, match="does not suit torch"):
        base_of({"type": "SGD", "params": {"learning_rate": 0.5}}, model)([w])
