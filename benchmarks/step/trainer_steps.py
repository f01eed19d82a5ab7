"""What a LandscapeTrainer's step costs beside the stock Trainer's: SAM against two steps, method none against one.

Trainers of one model in turns, a few updates each; only what lies between `on_step_begin` and `on_step_end` is counted,
so that neither the start of `train` nor the data is in it.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.models import SIZES, llama, units
from benchmarks.timing import ratio_of
from benchmarks.workers import on_ranks

UPDATES = 4
"""Of the stock Trainer and of method none in a turn; SAM takes half as many."""


def compare(size: str) -> dict[str, object]:
    """One process, or DistributedDataParallel on several (collective)."""
    import transformers

    class Watch(transformers.TrainerCallback):
        """Seconds inside of steps."""

        seconds = began = 0.0

        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.began = _now()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            self.seconds += _now() - self.began

    shape = SIZES[size]
    row = units(shape, 1)[0]
    rows = [{key: t[i].cpu() for key, t in row.items()} for i in range(len(row["labels"]))] * (UPDATES * 8)
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "trainer": (transformers.Trainer, {}),
        "none": (lso.LandscapeTrainer, {"landscape": None}),
        "sam": (lso.LandscapeTrainer, {"landscape": lso.SAM(rho=0.05)}),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers, watches = {}, {}
        for name, (kind, more) in kinds.items():
            args = transformers.TrainingArguments(
                output_dir=folder, max_steps=UPDATES // 2 if name == "sam" else UPDATES, report_to="none",
                per_device_train_batch_size=shape.samples, learning_rate=1e-4, save_strategy="no", disable_tqdm=True,
                logging_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=shape.bf16,
                dataloader_pin_memory=False, ddp_find_unused_parameters=False,
            )  # fmt: skip
            watches[name] = Watch()
            model = llama(shape)
            trainers[name] = kind(
                model=model, args=args, train_dataset=rows, callbacks=[watches[name]],
                optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}), **more,
            )  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(-1, shape.pairs):
            for name in list(kinds)[:: 1 if turn % 2 else -1]:
                watches[name].seconds = 0.0
                trainers[name].train()
                if turn >= 0:
                    times[name].append(watches[name].seconds)
    assert trainers["sam"].last_step.passes == 2, "SAM with fewer passes measures nothing"
    place = "ddp" if dist.is_initialized() and dist.get_world_size() > 1 else "one_process"
    figures = ratio_of(times["sam"], times["trainer"]).figures(f"sam_{place}_of_two_trainer_steps")
    return figures | ratio_of(times["none"], times["trainer"]).figures(f"none_{place}_of_trainer_step")


def _now() -> float:
    """After what was asked of the device and of the other ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def run() -> dict[str, object]:
    """One process, then one a core or a device."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for processes in (1, None):
        figures |= on_ranks("benchmarks.step.trainer_steps:compare", processes=processes, size=size)
    return figures
