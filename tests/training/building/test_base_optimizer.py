"""From `optim` and `param_groups` to a base: every rule of the file is the one that its parameters take."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.config.settings import (
    BY_FORM,
    DECOUPLED,
    EVALUATE_ELSEWHERE,
    NO_SQUARE_ROOT,
    SettingError,
    TrainConfig,
)
from elastic_lsopt.plan import ADAMLIKE, BETAS, OWN_BETAS, Policy
from elastic_lsopt.training.building.base_optimizer import base_of
from elastic_lsopt.training.building.engines import averages_of
from elastic_lsopt.training.estimate.state import STATES
from elastic_lsopt.updates.torch_update import ELEMENT_WISE

pytestmark = pytest.mark.fast

LEAST = {"dataset": "python-stdlib", "output_dir": "runs/a", "model": {"model_type": "llama"}, "max_steps": 10}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**LEAST, "learning_rate": 0.1, **changes})  # type: ignore[arg-type]


def base(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return base_of(config(**changes), model)(model.parameters())


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


class Sign(torch.optim.Optimizer):
    """A torch optimizer of a user's own."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, power: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "power": power})


def test_a_rule_for_all_parameters_is_their_class() -> None:
    made = base(net(), optim="adamw", param_groups=({"match": "*", "optim": "sgd"},), momentum=0.5)
    assert type(made) is torch.optim.SGD and {g["momentum"] for g in made.param_groups} == {0.5}


def test_muon_without_a_matrix_is_adamw() -> None:
    made = base(nn.LayerNorm(4), optim="muon", adam_beta1=0.8)
    assert type(made) is torch.optim.AdamW and made.param_groups[0]["betas"] == (0.8, 0.999)


def test_a_groups_own_arguments_count() -> None:
    rules = ({"match": "*.bias", "optim_args": {"betas": [0.5, 0.6]}},)
    made = base(net(), optim="adamw", param_groups=rules, adam_epsilon=1e-6)
    told = {(len(g["params"][0].shape), tuple(g["betas"]), g["eps"]) for g in made.param_groups}
    assert type(made) is torch.optim.AdamW and told == {(2, (0.9, 0.999), 1e-6), (1, (0.5, 0.6), 1e-6)}


def test_an_optimizer_of_ones_own_by_import_path() -> None:
    here = f"{__name__}:Sign"
    made = base(net(), optim=here, optim_args={"power": 2.0})
    assert type(made).__qualname__ == "Sign" and {g["power"] for g in made.param_groups} == {2.0}
    with pytest.raises(SettingError, match="may not work element by element"):
        base(net(), param_groups=({"match": "*.bias", "optim": here},))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"optim": "lamb", "optim_args": {"beta": 1}}, "no hyper-parameter 'beta'; did you mean 'betas'?"),
    ({"optim": "lamb", "optim_args": {"betas": [0.9, 0.9, 0.9]}}, "two numbers"),
    ({"optim": "lamb", "optim_args": {"eps": {"a": 1}}}, "eps={'a': 1} must be"),
    ({"param_groups": ({"match": "*", "optim": "lambb"},)}, "unknown optim 'lambb'; did you mean 'lamb'?"),
    ({"param_groups": ({"match": "*", "optim_args": {"momentum": 1}},)}, "update 'adamw' has no hyper-parameter"),
    ({"param_groups": ({"match": "*", "optim_args": 3},)}, "optim_args=3 must be a mapping"),
    ({"param_groups": ({"match": "*.gain"},)}, "no parameter takes the rule"),
    ({"optim": "nowhere:Class"}, "modules are looked for"),
    ({"optim": f"{__name__}:Sing"}, "did you mean 'Sign'?"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=str)
def test_a_wrong_rule_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        base(net(), **changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_average_is_called_as_its_key() -> None:
    given = {"ema": {"decay": 0.9}, "slow": {"import": "elastic_lsopt.averages.ema:EMA", "decay": 0.99}}
    made = averages_of(config(averages=given, global_batch_size=64, evaluate_average="slow"))
    assert [average.family for average in made] == ["averages/ema", "averages/slow"]
    assert {average.batch for average in made if isinstance(average, lso.EMA)} == {64}
    for own, says in (({"name": "x"}, "its name is its key"), ({"decey": 1}, "did you mean 'decay'?")):
        with pytest.raises(SettingError, match=says[:12]):
            averages_of(config(averages={"ema": own}))


def test_what_settings_know_of_updates_is_what_these_say() -> None:
    """Pure data beside the classes: decay that is decoupled, a point of their own, and Adam's rule."""
    ours = {name: lso.updates.get(name) for name in lso.updates.names()}
    by_form = {name for name, kind in ours.items() if "form" in {f.name for f in fields(kind)}}
    decoupled = {name for name, kind in ours.items() if kind().decoupled_weight_decay}
    assert by_form == BY_FORM and decoupled - by_form == DECOUPLED - {"adamw"} and decoupled >= by_form
    assert not any(ours[name](form="sgd").decoupled_weight_decay for name in by_form)
    assert {name for name, kind in ours.items() if kind.point is not lso.Update.point} == EVALUATE_ELSEWHERE
    with_betas = {name for name, kind in ours.items() if "betas" in {f.name for f in fields(kind)}}
    assert with_betas - NO_SQUARE_ROOT == set(OWN_BETAS) - {*ADAMLIKE} | {"lamb"}


@pytest.mark.parametrize("name", ["SOAP", "Adaptive_Memory", "schedule_free", "AdaHessian", "sophia_h", "sassha"])
def test_a_deepspeed_json_names_an_update(name: str) -> None:
    from elastic_lsopt.api.json_base import base_of as of_json

    model = net()
    made = of_json({"type": name, "params": {"lr": 0.1, "weight_decay": 0.01}}, model)(model.parameters())
    assert isinstance(made, lso.UpdateOptimizer) and made.param_groups[0]["update"] == name.lower()


def test_the_batch_is_held_for_every_groups_betas() -> None:
    """LAMB's and AdamW's beside Muon, whether the file says them or not."""
    own = {kind.__name__.lower(): kind for kind in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)}
    assert {*ADAMLIKE} == {"lamb", *own} and lso.LAMB().betas == BETAS and lso.SOAP().betas == OWN_BETAS["soap"]
    assert all(kind([torch.zeros(1)], lr=0.1).defaults["betas"] == BETAS for kind in own.values())
    elastic = {"policy": "scale_batch", "reference_workers": 1, "lr_rule": "sqrt"}
    of = {"global_batch_size": 8, "per_device_train_batch_size": 8, "elastic": elastic}
    for changes in ({"optim": "lamb"}, {"optim": "muon"}, {"param_groups": ({"match": "*", "optim": "lamb"},)}):
        policy = Policy.of(config(**{**of, **changes}))
        assert not policy.breaks(9, None) and "betas=(0.9, 0.999)" in policy.breaks(10, None)


@pytest.mark.parametrize("kind", sorted(ELEMENT_WISE, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_each_element_wise_class_by_name_and_what_it_keeps(kind: type[torch.optim.Optimizer]) -> None:
    """Its steps are those of the class; the plan counts what it keeps per parameter."""
    name = kind.__name__.lower()
    own: dict[str, Any] = {"initial_accumulator_value": 0.3} if name == "adagrad" else {}
    config = TrainConfig(**LEAST, optim=name, optim_args=own, learning_rate=0.01)
    mine, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(mine.state_dict())
    make: Any = kind
    theirs_base = make(theirs.parameters(), lr=0.01, **own, **({"weight_decay": 0.0} if name == "adamw" else {}))
    base = base_of(config, mine)(mine.parameters())
    engine = lso.Engine.of(mine, base, loss_fn=lambda model, x: model(x).square().mean())
    for i in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        engine.train_batch([x])
        theirs_base.zero_grad()
        theirs(x).square().mean().backward()
        theirs_base.step()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-6, atol=1e-7)
    kept = sum(
        v.numel() for s in theirs_base.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()
    )
    assert STATES.get(name, 0) * mine.weight.numel() == kept


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optim": "rprop", "weight_decay": 0.1}, "rprop has no weight decay"),
        ({"optim": "torch.optim:Muon"}, "torch's Muon makes a shard orthogonal"),
        ({"optim": "nadam", "optim_args": {"beta": 1}}, "has no hyper-parameter 'beta'"),
        ({"optim": "rmsprop", "momentum": 0.9}, "momentum is for optim sgd, but optim=rmsprop; use optim_args"),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9}}, "optim_args.momentum of optim=sgd is a key of the job"),
    ],
)
def test_what_a_class_does_not_take_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        base_of(TrainConfig(**LEAST, **given), nn.Linear(3, 2))
