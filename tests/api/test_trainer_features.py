"""What users do with a Trainer, on one process: right with several passes, or as the stock Trainer does it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import elastic_lsopt as lso
from tests.cases import trainer as cases
from tests.cases.trainer_checkpoints import Lagging
from tests.cases.trainer_laws import against_paper
from tests.laws.cover import full_but

SAM = lso.SAM(**cases.METHODS["sam"])


def made(
    folder: Path, *, model: Any = None, data: Any = None, landscape: Any = SAM, parent: Any = None, **more: Any
) -> Any:
    args = cases.arguments("plain", str(folder), **{k: v for k, v in more.items() if k not in OWN})
    chosen = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": cases.LR, "momentum": cases.MOMENTUM})}
    own = {k: v for k, v in more.items() if k in OWN}
    return (parent or lso.LandscapeTrainer)(
        model=model or cases.llama(), args=args, train_dataset=data or cases.rows(), landscape=landscape,
        **(own if "optimizers" in own else chosen | own),
    )  # fmt: skip


OWN = ("eval_dataset", "callbacks", "optimizers", "optimizer_cls_and_kwargs")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    with cases.fresh():
        yield


@pytest.mark.parametrize(
    "more",
    [
        {"activation_checkpointing": True, "own_loss": True},
        pytest.param({"tied": True}, marks=pytest.mark.full),
        pytest.param({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, marks=pytest.mark.full),
        pytest.param({"torch_compile": True}, marks=pytest.mark.full),
    ],
)
def test_arguments_that_change_no_number(more: dict[str, Any]) -> None:
    r = against_paper("plain", "sam", 0.5, **more)
    assert r["dw"] < 1e-6 and r["moved"] > 1e-2, r


class Dropped(nn.Module):
    """A regression with dropout, batch norm and a note of each mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.norm, self.last = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
        self.seen: list[list[float]] = []
        self.statistics: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.norm(self.first(x))
        mask = nn.functional.dropout(torch.ones_like(h), 0.5, self.training)
        if self.training:
            self.seen.append(mask.flatten().tolist())
            self.statistics.append(self.norm.running_mean.clone())  # type: ignore[union-attr]
        out = self.last(torch.relu(h) * mask).squeeze(-1)
        return {"logits": out} if labels is None else {"loss": ((out - labels) ** 2).mean(), "logits": out}


def points() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(5, generator=draw), "labels": torch.randn((), generator=draw)} for _ in range(24)]


def test_both_passes_see_one_mask_and_statistics_move_once(tmp_path: Path) -> None:
    """At a rate of 0, so that the forwards at the weights are those of a copy that never steps."""
    model, plain = Dropped(), Dropped()
    still = torch.optim.SGD, {"lr": 0.0}
    made(tmp_path, model=model, data=points(), max_steps=2, optimizer_cls_and_kwargs=still).train()
    masks = [model.seen[i : i + 3] for i in range(0, 12, 3)]
    assert masks[0] == masks[1] and masks[2] == masks[3]
    assert len({tuple(mask) for some in (masks[0], masks[2]) for mask in some}) == 6
    rows = points()
    for at in range(0, 24, 4):
        plain(torch.stack([row["x"] for row in rows[at : at + 4]]))
    assert torch.allclose(model.norm.running_mean, plain.norm.running_mean, atol=1e-6)  # type: ignore[arg-type]
    assert model.norm.num_batches_tracked == 6 and not torch.allclose(model.statistics[5], model.statistics[2])


def test_trained_a_second_time_it_goes_on(tmp_path: Path) -> None:
    """A method's memory outlives `train`, as the optimizer's does."""
    trainer = made(tmp_path, landscape=Lagging(), max_steps=2)
    trainer.train()
    step, memory = trainer._landscape_step, trainer._landscape_step.state["last"]
    trainer.args.max_steps = 3
    trainer.train()
    assert trainer._landscape_step is step and step.state["seen"] == 5 and step.state["last"] is not memory


def test_out_of_memory_finds_a_smaller_batch(tmp_path: Path) -> None:
    """In a second pass, where the weights are not the model's."""

    class Tight(lso.LandscapeTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
            if len(inputs["input_ids"]) > 2 and self._landscape_step.space.copies.perturbations:  # type: ignore[union-attr]
                raise RuntimeError("CUDA out of memory. Tried to allocate all of it.")
            return super().compute_loss(model, inputs, *args, **more)

    trainer = made(tmp_path, parent=Tight, auto_find_batch_size=True, max_steps=2)
    start = cases.trained_of(trainer.model)
    trainer.train()
    assert trainer._train_batch_size == 2 and trainer.last_step.samples == 6
    small = made(tmp_path, per_device_train_batch_size=2, max_steps=2)
    small.train()
    assert (
        cases.apart(cases.weights_of(trainer), cases.weights_of(small))
        < 1e-6
        < cases.apart(start, cases.weights_of(small))
    )


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(lso.LandscapeTrainer):
        def compute_loss(self, *args: Any, **more: Any) -> Any:
            loss = super().compute_loss(*args, **more)
            return loss * math.nan if self.state.global_step == 1 else loss

    reports, weights = [], []

    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            reports.append(trainer.last_step)
            weights.append(cases.trained_of(more["model"]))

    trainer = made(tmp_path, parent=Broken, max_steps=3, callbacks=[Watching()])
    trainer.train()
    assert [r.skipped for r in reports] == [False, True, False] and "skipped a step" in caplog.text
    assert cases.apart(weights[0], weights[1]) == 0.0 < cases.apart(weights[1], weights[2])


class Stream(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_a_stream_that_ends_inside_of_an_update(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """4 micro-batches: an update of three, and one that is left out in each round through the data."""
    trainer = made(tmp_path, data=Stream(cases.rows()[:16]), max_steps=2)
    trainer.train()
    whole = made(tmp_path, data=cases.rows()[:12] * 2, max_steps=2)
    whole.train()
    assert cases.apart(cases.weights_of(trainer), cases.weights_of(whole)) < 1e-6
    assert "its last 1 micro-batches are less than gradient_accumulation_steps=3" in caplog.text


def test_the_schedule_of_a_method_follows_the_trainers_steps(tmp_path: Path) -> None:
    """LPF-SGD's gamma at t / T, read where it is drawn, also after a resume."""
    seen: list[float] = []

    class Noting(lso.LPFSGD):
        def gamma_at(self, progress: float) -> float:
            seen.append(progress)
            return super().gamma_at(progress)

    method = Noting(parts=3, gamma=0.01, alpha=2.0)
    made(tmp_path, landscape=method, max_steps=4, save_strategy="steps", save_steps=2).train()
    made(tmp_path, landscape=method, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [0.0, 0.25, 0.5, 0.75, 0.5, 0.75]


@pytest.mark.parametrize("update", full_but([("lamb",)], ("lamb", "lars", "muon", "soap", "adaptive_memory")))
def test_an_update_of_ours_as_the_optimizer(tmp_path: Path, update: str) -> None:
    """Clipped as the loop would clip it; the norm in the log is the one before."""

    def base(model: Any) -> lso.UpdateOptimizer:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "update": update}, {"params": rest, "update": "AdamW"}]
        return lso.UpdateOptimizer(groups, lr=0.02)

    model = cases.llama()
    trainer = made(tmp_path, model=model, optimizers=(base(model), None), max_steps=3, max_grad_norm=0.5,
                   lr_scheduler_type="constant")  # fmt: skip
    trainer.train()
    plain = cases.llama()
    engine = lso.Engine.of(plain, base(plain), method=SAM, max_grad_norm=0.5)
    norms = []
    for k in range(3):
        some = cases.rows()[k * 12 : k * 12 + 12]
        units = [some[at : at + 4] for at in (0, 4, 8)]
        engine.train_batch([{key: torch.stack([row[key] for row in unit]) for key in unit[0]} for unit in units])
        assert engine.last_step is not None
        norms.append(engine.last_step.gradient_norm)
    assert cases.apart(cases.weights_of(trainer), cases.trained_of(plain)) < 1e-6
    assert [row["grad_norm"] for row in trainer.state.log_history[:-1]] == pytest.approx(norms, rel=1e-4)


def test_evaluate_and_predict(tmp_path: Path) -> None:
    trainer = made(tmp_path, max_steps=1, eval_dataset=cases.rows()[:8])
    trainer.train()
    model = trainer.model.eval()
    batch = {key: torch.stack([row[key] for row in cases.rows()[:8]]) for key in cases.rows()[0]}
    with torch.no_grad():
        wanted = model(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted.loss), rel=1e-5)
    told = trainer.predict(cases.rows()[:8])  # type: ignore[arg-type]
    assert torch.allclose(torch.as_tensor(told.predictions), wanted.logits, atol=1e-5)


def test_bf16_by_autocast_trains(tmp_path: Path) -> None:
    trainer = made(tmp_path, bf16=True, max_steps=3)
    trainer.train()
    assert trainer.last_step.passes == 2 and trainer.last_step.gradient_norm > 0
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_an_update_of_ours_steps_with_method_none_too(tmp_path: Path) -> None:
    """The stock loop's `optimizer.step()` would find nothing to do."""
    model = cases.llama()
    start = cases.trained_of(model)
    optimizers = lso.UpdateOptimizer(model.parameters(), "lamb", lr=0.02), None
    trainer = made(tmp_path, model=model, landscape=None, optimizers=optimizers, max_steps=1)
    trainer.train()
    assert trainer.last_step.passes == 1 and cases.apart(cases.weights_of(trainer), start) > 1e-3
