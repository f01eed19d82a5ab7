"""The README.md of an exported model: on what it was trained, by which method, how far, and by which members."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.training.pace import batches_told

SHOWN_CHANGES = 50
"""Changes of members in a card; of a longer journal the last ones."""


def model_card(
    config: TrainConfig,
    *,
    method: Method,
    base: str,
    clock: SampleClock,
    parameters: int,
    held_out_loss: float | None,
    journal: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown with Hugging Face's head of metadata. Pure; names files and folders of the job by their last part."""
    name, data = Path(config.output_dir).name, Path(config.dataset).name
    head: dict[str, Any] = {"tags": ["elastic_lsopt", _kind(method)]}
    if config.task != "classification":
        head["library_name"] = "transformers"
        head["pipeline_tag"] = "text-generation" if config.task == "causal_lm" else "text-classification"
    if config.model_name_or_path is not None:
        head["base_model"] = _model_name(config.model_name_or_path)
    rows = {
        "started from": "random weights" if config.model is not None else head["base_model"],
        "task": config.task,
        "data": data,
        "method": _told(method),
        "base optimizer": f"{base}, peak learning rate {config.learning_rate:g} ({config.lr_scheduler_type})",
        "batch": f"{batches_told(config)} samples per step",
        "training": f"{clock.samples:,} samples in {clock.steps:,} steps",
        "trained parameters": f"{parameters:,}",
        "seed": config.seed,
    }
    if config.evaluate_average is not None:
        said = config.averages.get(config.evaluate_average, {})
        rows["weights"] = f"the average {config.evaluate_average}, {said}"
    if held_out_loss is not None:
        rows["held-out loss"] = f"{held_out_loss:.4f} nats"
    lines = [
        "---", yaml.safe_dump(head, sort_keys=True).strip(), "---", "", f"# {name}", "",
        "Trained with elastic_lsopt.", "", "| | |", "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in rows.items()),
    ]  # fmt: skip
    if journal:
        lines += ["", "## Members", "", "| when | step | workers | why |", "| --- | ---: | ---: | --- |"]
        lines += [
            f"| {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(row['time']))} UTC | {row['step']} | "
            f"{len(row['workers'])} | {row['why']} |"
            for row in journal[-SHOWN_CHANGES:]
        ]
    return "\n".join(lines) + "\n"


def _kind(method: Method) -> str:
    return type(method).__name__.lower()


def _told(method: Method) -> str:
    if not is_dataclass(method) or not (fields := asdict(method)):
        return type(method).__name__
    return f"{type(method).__name__}({', '.join(f'{key}={value}' for key, value in fields.items())})"


def _model_name(where: str) -> str:
    """A hub name as it is, of a path the last part."""
    path = Path(where).expanduser()
    return path.name if path.exists() or where.count("/") != 1 else where
