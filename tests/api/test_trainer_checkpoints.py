"""A LandscapeTrainer's checkpoint: bit for bit where it was saved, and right at another world size and backend."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from tests.api.test_landscape_trainer import NATIVE, PLACES, on
from tests.cases import trainer as trainers
from tests.cases import trainer_checkpoints as cases

WAYS = [
    (("ddp", 2), ("plain", 1), False),
    (("fsdp2", 2), ("zero3", 2), False),
    (("zero2", 2), ("plain", 1), True),
    (NATIVE, NATIVE, False),
    (NATIVE, ("zero1", 2), False),
    (("plain", 1), NATIVE, False),
]


def saved_and_resumed(ranks: Any, folder: Path, there: Any, here: Any, lora: bool) -> tuple[dict[str, Any], list[Any]]:
    was = on(ranks, there[1], cases.saved, kind=there[0], folder=str(folder), lora=lora)[0]
    again = on(ranks, here[1], cases.resumed, kind=here[0], folder=str(folder), wanted=was["weights"], lora=lora)
    return was, again


@pytest.mark.parametrize(
    "there,here,lora",
    [pytest.param(*way, marks=pytest.mark.full if way[2] or NATIVE in way else ()) for way in WAYS]
    + [
        pytest.param(there, here, lora, marks=pytest.mark.full)
        for there in PLACES
        for here in PLACES
        for lora in (False, True)
        if (there, here, lora) not in WAYS
    ],
)
def test_resumed_anywhere(ranks: Callable[[int], Any], tmp_path: Path, there: Any, here: Any, lora: bool) -> None:
    """From the checkpoint of step 2, with AdamW and a method that remembers a gradient and a count."""
    was, again = saved_and_resumed(ranks, tmp_path, there, here, lora)
    for r in again:
        assert r["seen"] == was["seen"] == r["step"] == 6
        assert r["dw"] == 0.0 if there == here else r["dw"] < 1e-6, r
    assert {"landscape", "scheduler.pt", "trainer_state.json"} <= {*was["files"]}
    assert "optimizer.pt" not in was["files"]


@pytest.mark.parametrize("place", [("plain", 1), *(pytest.param(p, marks=pytest.mark.full) for p in PLACES[1:])])
def test_resumed_where_it_was(ranks: Callable[[int], Any], tmp_path: Path, place: Any) -> None:
    _, again = saved_and_resumed(ranks, tmp_path, place, place, False)
    assert all(r["dw"] == 0.0 and r["seen"] == 6 for r in again)
    # Ours is safetensors and JSON; the rest is Hugging Face's own.
    for path in (tmp_path / "checkpoint-2" / "landscape").rglob("*.*"):
        assert path.suffix in (".safetensors", ".json"), path
        with pytest.raises((pickle.UnpicklingError, KeyError, ValueError, EOFError, IndexError)):
            pickle.loads(path.read_bytes())


def test_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    cases.saved("plain", str(tmp_path), max_steps=2)
    manifest = tmp_path / "checkpoint-2" / "landscape" / "checkpoint-2" / "manifest.json"
    told = json.loads(manifest.read_text())
    for file in told["files"].values():
        file["blake2b"] = "0" * 64
    manifest.write_text(json.dumps(told))
    with trainers.fresh(), pytest.raises(lso.UserError, match="does not match its checksum") as caught:
        cases.run("plain", str(tmp_path / "other"), resume=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(caught.value)


def test_a_stock_trainers_is_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights and optimizer are the Trainer's; what the method remembers begins anew, and says so."""
    from transformers import Trainer

    with trainers.fresh():
        args = trainers.arguments("plain", str(tmp_path), save_strategy="steps", save_steps=2, max_steps=2)
        stock = Trainer(model=trainers.llama(lora=True), args=args, train_dataset=trainers.rows())
        stock.train()
        start = trainers.weights_of(stock)
    with trainers.fresh():
        args = trainers.arguments("plain", str(tmp_path), max_steps=3, learning_rate=0.0)
        trainer = lso.LandscapeTrainer(
            model=trainers.llama(lora=True), args=args, train_dataset=trainers.rows(), landscape=cases.Lagging()
        )
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3 and trainers.apart(trainers.weights_of(trainer), start) == 0.0
        step = trainer._landscape_step
        assert step is not None and step.state["seen"] == 1
        assert trainer.optimizer.optimizer.state[next(iter(trainer.optimizer.optimizer.state))]["step"] == 3
    assert "no LandscapeTrainer's checkpoint: the method begins anew" in caplog.text


@pytest.mark.parametrize("kind,world", [("plain", 1), pytest.param("fsdp2", 2, marks=pytest.mark.full),
                                        pytest.param("zero3", 2, marks=pytest.mark.full)])  # fmt: skip
def test_the_best_model_at_the_end(ranks: Callable[[int], Any], tmp_path: Path, kind: str, world: int) -> None:
    for r in on(ranks, world, cases.best_at_end, kind=kind, folder=str(tmp_path)):
        assert r["dw"] == 0.0 and r["best"] == "checkpoint-2", r


def test_a_schedule_of_ones_own_goes_on(tmp_path: Path) -> None:
    """By milestones, whose table JSON would spoil."""
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        with trainers.fresh():
            model = trainers.llama()
            base = torch.optim.SGD(model.parameters(), lr=0.2)
            schedule = torch.optim.lr_scheduler.MultiStepLR(base, [1, 3])
            trainer = lso.LandscapeTrainer(
                model=model, train_dataset=trainers.rows(), landscape="sam", optimizers=(base, schedule),
                args=trainers.arguments("plain", str(tmp_path), max_steps=5, save_strategy="steps", save_steps=2),
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resume)
            found.append([row["learning_rate"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == found[1] == pytest.approx([0.2, 0.02, 0.02, 0.002, 0.002])
