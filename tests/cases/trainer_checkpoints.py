"""A LandscapeTrainer that saves, and one that goes on from there."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases.trainer import (
    apart,
    arguments,
    end,
    fresh,
    llama,
    natively_sharded,
    rows,
    trainer_class,
    weights_of,
    world_size,
)


@dataclass(frozen=True, kw_only=True)
class Lagging:
    """Half of the last step's gradient beside this one's: what it remembers is half of a step."""

    parts = 1

    def init(self, space: Any) -> Any:
        return {"last": space.zeros(), "seen": 0}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        mine = oracle.gradient().clone()
        made = mine.clone().add_(state["last"], 0.5)
        state["last"], state["seen"] = mine, state["seen"] + 1
        return made


def run(kind: str, folder: str, resume: str | None = None, parent: Any = None, lora: bool = False, **more: Any) -> Any:
    """A trainer after its run, inside `fresh()`."""
    args = arguments(kind, folder, world_size(), **({"save_strategy": "steps", "save_steps": 2} | more))
    trainer = trainer_class(kind, parent)(
        model=natively_sharded(folder) if kind == "native" else llama(lora), args=args, train_dataset=rows(),
        eval_dataset=rows()[:8], landscape=Lagging(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.02, "eps": 1e-3}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved(kind: str, folder: str, **more: Any) -> dict[str, Any]:
    """A run that saves after every second step; its weights, and what lies in the folder."""
    with fresh():
        trainer = run(kind, folder, **more)
        found = {n: t.tolist() for n, t in weights_of(trainer).items()}
        seen = trainer._landscape_step.state["seen"]
        end(trainer)
    if dist.is_initialized():
        dist.barrier()
    return {"weights": found, "seen": seen, "files": sorted(p.name for p in (Path(folder) / "checkpoint-2").iterdir())}


def resumed(kind: str, folder: str, wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    """From the checkpoint of step 2; how far the weights end from those of the run that was not stopped."""
    with fresh(), tempfile.TemporaryDirectory() as other:
        trainer = run(kind, other, resume=f"{folder}/checkpoint-2", save_strategy="no", **more)
        dw = apart(weights_of(trainer), {n: torch.tensor(t) for n, t in wanted.items()})
        out = {"dw": dw, "seen": trainer._landscape_step.state["seen"], "step": trainer.state.global_step}
        end(trainer)
    return out


def best_at_end(kind: str, folder: str) -> dict[str, Any]:
    """The metric is the best after step 2; the weights at the end are those that were there then."""
    from transformers import TrainerCallback

    then: dict[str, Tensor] = {}

    class Keeping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 2:
                then.update(weights_of(made[0]))

    made: list[Any] = []

    class Scored(trainer_class(kind)):
        def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
            found = super().evaluate(*args, **more) | {"eval_score": -abs(self.state.global_step - 2.0)}
            return found

    with fresh():
        args = arguments(
            kind, folder, world_size(), max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps",
            eval_steps=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip
        made.append(
            Scored(
                model=llama(), args=args, train_dataset=rows(), eval_dataset=rows()[:8], landscape=Lagging(),
                callbacks=[Keeping()],
            )
        )  # fmt: skip
        made[0].train()
        out = {"dw": apart(weights_of(made[0]), then), "best": Path(made[0].state.best_model_checkpoint).name}
        end(made[0])
    return out
