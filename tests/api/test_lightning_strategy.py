"""DeepSpeed inside Lightning by our strategy: the paper's weights, and what it does not do refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest

import elastic_lsopt as lso
from tests.cases.trainer import FAMILY as WITHOUT_LOGITS
from tests.laws.cover import full_but

FAMILY = [name for name in WITHOUT_LOGITS if name != "nbar"]  # which is of LoRA


@pytest.mark.parametrize(
    "stage,method,accumulated,clip",
    full_but([(2, "sam", 3, 0.3), (3, "sam", 1, 0.0)], (0, 1, 2, 3), ("sam", "asam", "none"), (1, 3), (0.0, 0.3)),
)
def test_weights_are_the_papers(ranks: Any, stage: int, method: str, accumulated: int, clip: float) -> None:
    """Two ranks, five updates, a falling rate, dropout-free; forwards are counted, and the loss that is logged is that
    at the weights themselves."""
    case = "tests.cases.lightning_deepspeed:against_paper"
    for r in ranks(2).run(case, stage=stage, method=method, accumulated=accumulated, clip=clip, extra=["frozen"]):
        assert r["place"] == ("zero12" if stage in (1, 2) else f"zero{stage}") and r["steps"] == [5, 5], r
        assert r["dw"] < 1e-6, r
        assert r["forwards"] == 5 * accumulated * (1 if method == "none" else 2) and r["evaluated"] == 2 + 2, r
        assert r["rate"] == pytest.approx(0.0) and r["logged"] == pytest.approx(r["mean_loss"], abs=2e-6), r


@pytest.mark.parametrize("stage,method", full_but([(2, "rwp")], (0, 1, 2, 3), FAMILY))
def test_weights_of_the_family_are_the_papers(ranks: Any, stage: int, method: str) -> None:
    """What is logged is the loss at the first look at each micro-batch, also where the batch is taken in parts."""
    case = "tests.cases.lightning_deepspeed:against_paper"
    for r in ranks(2).run(case, stage=stage, method=method, accumulated=2, clip=0.3, extra=[]):
        assert r["dw"] < 1e-6 and r["logged"] == pytest.approx(r["mean_loss"], abs=2e-6), r


def test_saved_and_gone_on_with(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run("tests.cases.lightning_deepspeed:resumed", path=str(tmp_path)) == [0.0, 0.0]


def test_what_it_does_not_do_is_refused_in_one_line(ranks: Any) -> None:
    for told in ranks(2).run("tests.cases.lightning_deepspeed:refusals"):
        assert told == [
            "parts", "by hand", "checkpoints", "by value", "batch norm", "own clipping", "twice", "nothing returned",
        ], told  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(
    "precision,says",
    [("16-true", "fp16 needs loss scaling, which is refused"), ("bf16-mixed", "use 32-true or bf16-true")],
)
def test_precisions_are_refused_when_the_trainer_is_made(precision: Any, says: str) -> None:
    strategy = lso.LandscapeDeepSpeedStrategy({"zero_optimization": {"stage": 2}}, lso.SAM())
    with pytest.raises(lso.UserError, match=says):
        lightning.Trainer(accelerator="cpu", devices=1, strategy=strategy, precision=precision, logger=False)


@pytest.mark.fast
@pytest.mark.parametrize(
    "json,says",
    [
        ({"fp16": {"enabled": True}}, "loss scaling is not supported; use bf16"),
        ({"optimizer": {"type": "AdamW"}}, "return it from configure_optimizers"),
    ],
)
def test_a_json_is_refused_when_the_strategy_is_made(json: Any, says: str) -> None:
    with pytest.raises(lso.UserError, match=says):
        lso.LandscapeDeepSpeedStrategy(json, lso.SAM())


@pytest.mark.fast
def test_what_is_no_method_is_refused() -> None:
    for wrong in (lso.SAM, "sam", None):
        with pytest.raises(lso.UserError, match=r"is no method; give one, such as lso.SAM\(rho=0.05\)"):
            lso.LandscapeDeepSpeedStrategy({}, wrong)  # type: ignore[arg-type]


@pytest.mark.fast
def test_a_method_whose_model_is_elsewhere_is_refused() -> None:
    with pytest.raises(lso.UserError, match="bi_lora: Lightning evaluates and saves the weights as they are"):
        lso.LandscapeDeepSpeedStrategy({}, lso.BiLoRA())


@pytest.mark.fast
@pytest.mark.parametrize("method", [lso.ESAM(), lso.FunctionalSAM()])
def test_what_needs_the_logits_is_refused(method: Any) -> None:
    with pytest.raises(
        lso.UserError, match=r"needs the logits, and Lightning's training_step gives the loss alone; use"
    ):
        lso.LandscapeDeepSpeedStrategy({}, method)


@pytest.mark.full
def test_bf16(ranks: Any) -> None:
    """DeepSpeed's bf16 weights with fp32 masters, in the Trainer's bf16-true: it learns as in fp32."""
    for r in ranks(2).run("tests.cases.lightning_deepspeed:in_bf16"):
        assert r["types"] == ["torch.bfloat16"] and r["losses"][1] == pytest.approx(r["losses"][0], rel=0.05), r
