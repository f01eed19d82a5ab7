"""Measures of a finished model: a checkpoint of a run, or a Hugging Face folder, on any number of workers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.checkpoint.checkpointer import Checkpointer
from elastic_lsopt.checkpoint.folder import MANIFEST, listing, step_of
from elastic_lsopt.config.load import load_config
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.probes.catalogue import ProbeContext, measure
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.training.building.engines import build_engine, plain_loss_of
from elastic_lsopt.training.building.imported_model import refuse_untrusted
from elastic_lsopt.training.datasets.samples import Data, build_data
from elastic_lsopt.training.probing.answer_folder import answers_folder, claimed, run_of, unwritable
from elastic_lsopt.training.probing.during_training import fixed_microbatches
from elastic_lsopt.training.reporting.run_folder import CHECKPOINTS, CONFIG
from elastic_lsopt.world import World

RESULTS = "probes.json"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be measured: `measures` by name with their settings, on `units` units of `batch_size` samples."""

    model: Path
    measures: Mapping[str, Mapping[str, Any]]
    output: Path | None = None
    """Where the answer's own folder is made; None: in the run (see probe_folder.py)."""
    data: str | None = None
    """A dataset as in a job's YAML; None: the run's own."""
    units: int = 4
    batch_size: int | None = None
    block_size: int | None = None
    products: str = "auto"
    other: Path | None = None
    """Another model of the same shape, for the way between the two."""
    average: str | None = None
    """An average that the run kept, at which is measured; None: the weights themselves."""
    trust: bool = False
    """Whether code that a run's settings name as its model may run."""


def settings_of(question: Question, world_size: int) -> tuple[TrainConfig, Path | None]:
    """The job that builds this model again, and the checkpoint to load (None: the folder's own weights).

    Raises UserError for a path that is neither a checkpoint, a run folder nor a Hugging Face folder, and for a run
    whose model is code that is not trusted.
    """
    path = question.model
    is_run = not (path / "config.json").is_file()
    known = [*(["initial"] if is_run else []), *(["other"] if question.other is not None else [])]
    for name, settings in question.measures.items():
        measure(name, settings, known)
    backend: Any = "fsdp2" if world_size > 1 else "replicated"
    own: dict[str, Any] = {
        "backend": backend, "deepspeed": None, "workers": 1, "bf16": False,
        "fsdp_replicas": 1, "fsdp_reshard_after_forward": True, "fsdp_cpu_offload": False,
        "activation_checkpointing": False, "elastic": None, "report_to": (), "probes": {},
        "landscape": {"method": "none"}, "landscape_space": "trained",
    }  # fmt: skip
    asked = {
        "dataset": question.data,
        "per_device_train_batch_size": question.batch_size,
        "block_size": question.block_size,
    }
    own |= {key: value for key, value in asked.items() if value is not None}
    if not is_run:
        if question.average is not None:
            raise UserError(
                f"{path} is a Hugging Face folder, which holds no average; remove --average, or give the run."
            )
        if question.data is None:
            raise UserError(f"{path} is a Hugging Face folder, which names no data; give --data.")
        task = _task_of(path)
        own |= {"global_batch_size": own.get("per_device_train_batch_size", 8), "max_steps": 1}
        return TrainConfig(output_dir=str(path), model_name_or_path=str(path), task=task, **own), None
    checkpoint = _checkpoint(path)
    run = run_of(checkpoint)
    if not (run / CONFIG).is_file():
        raise UserError(f"{checkpoint} lies in no run folder ({run / CONFIG} is missing), so its model is not known.")
    config = load_config(run / CONFIG)
    refuse_untrusted(config, run / CONFIG, trust=question.trust)
    if question.average is not None and question.average not in config.averages:
        kept = ", ".join(config.averages) or "none"
        raise UserError(f"--average {question.average} was not kept by {run} (averages: {kept}).")
    own["global_batch_size"] = max(config.global_batch_size, own.get("per_device_train_batch_size", 1))
    return replace(config, **own), checkpoint


def _checkpoint(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    if found := listing(path / CHECKPOINTS) or listing(path):
        return found[0]
    what = "does not exist" if not path.exists() else "is no checkpoint, run folder or Hugging Face folder"
    raise UserError(f"{path} {what}; give runs/NAME, runs/NAME/checkpoints/checkpoint-STEP, or a saved model's folder.")


def _task_of(path: Path) -> Any:
    shape = json.loads((path / "config.json").read_text(encoding="utf-8"))
    architectures = shape.get("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return "sequence_classification"
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    kind = architectures[0] or "model without architectures"
    raise UserError(f"{path} holds a {kind}: supported are causal language models and sequence classifiers.")


def answer(question: Question, world: World, say: Any = lambda line: None) -> tuple[dict[str, Any], Path | None]:
    """Measure (collective); rank 0 writes probes.json after each measure: what it says, and rank 0's folder for it.

    The folder is made first, so a place that cannot be written costs no measurement. A measure that cannot be taken of
    this model is null, with the reason under `failed`. Raises UserError for a wrong input.
    """
    config, checkpoint = settings_of(question, world.size)
    answers = answers_folder(question.model, checkpoint, question.output)
    folder = world.on_first(lambda: claimed(answers))
    try:
        return _measured(question, config, checkpoint, folder, world, say), folder
    finally:
        if folder is not None:
            with suppress(OSError):  # it stays where there is an answer in it
                folder.rmdir()


def _measured(
    question: Question, config: TrainConfig, checkpoint: Path | None, folder: Path | None, world: World, say: Any
) -> dict[str, Any]:
    data = build_data(config)
    engine = build_engine(config, Plain(), data, world, total_samples=config.global_batch_size)
    asks = any(measure(name, {}).needs == "initial" for name in question.measures)
    initial = engine.space.weights.clone() if asks else None  # what the run's settings build is where it began
    _fill(engine, checkpoint)
    engine.module.eval()
    other = _weights_of(question.other, question, engine, data, world) if question.other is not None else None
    with nullcontext() if question.average is None else engine.averaged(question.average):
        return _taken(question, config, checkpoint, folder, world, say, engine, data, initial, other)


def _taken(
    question: Question, config: TrainConfig, checkpoint: Path | None, folder: Path | None, world: World, say: Any,
    engine: Engine, data: Data, initial: Vector | None, other: Vector | None,
) -> dict[str, Any]:  # fmt: skip
    """The measures where the engine's weights are now."""
    units, single = fixed_microbatches(data, config, world, question.units)
    loss = plain_loss_of(config, engine.module)
    measuring = Measurement(engine.space, engine.backend, loss, products=question.products)  # type: ignore[arg-type]
    together = measuring.oracle(units, engine.clock)
    context = ProbeContext(
        space=engine.space, oracle=together, samples=len(data.train), other=other, initial=initial,
        batches=lambda: [measuring.oracle(single(i), engine.clock, checked=False) for i in range(question.units)],
    )  # fmt: skip
    told: dict[str, Any] = {
        "model": str(checkpoint or question.model), "step": _step(checkpoint), "average": question.average,
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "data": config.dataset, "samples": together.samples,
        "parameters": engine.space.layout.numel, "workers": world.size, "loss": together.loss(), "probes": {},
        "failed": {},
    }  # fmt: skip
    for name, settings in question.measures.items():
        with measuring.at_rest():
            answer = measuring.take(name, settings, context)
        told["probes"][name] = answer.told
        if answer.reason is not None:
            told["failed"][name] = answer.reason
        say(f"{name}: {answer.seconds:.1f} s")
        world.on_first(lambda: None if folder is None else _write(folder, told))
    measuring.done_with(together)
    return told


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None or (step := step_of(checkpoint)) < 0 else step


def _fill(engine: Engine, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        loader = Checkpointer(checkpoint.parent)
        loader.resume(engine, checkpoint, hyperparameters=False)
        loader.close()


def _weights_of(path: Path, question: Question, engine: Engine, data: Data, world: World) -> Vector:
    """Another model's weights as a vector of this one's space (collective). Raises UserError for another shape."""
    config, checkpoint = settings_of(replace(question, model=path, measures={}, average=None), world.size)
    loaded = build_engine(config, Plain(), data, world, total_samples=config.global_batch_size)
    _fill(loaded, checkpoint)
    found = loaded.space
    for mine, theirs in zip(engine.space.layout.parameters, found.layout.parameters, strict=False):
        if mine != theirs:
            raise UserError(
                f"--other {path} is another model: parameter {theirs.name} {list(theirs.shape)} stands where "
                f"{mine.name} {list(mine.shape)} does; give one of the same shape."
            )
    if len(engine.space.layout.parameters) != len(found.layout.parameters):
        raise UserError(f"--other {path} is another model: it has {len(found.layout.parameters)} parameters.")
    out = engine.space.empty()
    for t, theirs in zip(out.tensors, found.weights.tensors, strict=True):
        t.copy_(theirs)
    return out


def _write(folder: Path, told: dict[str, Any]) -> None:
    unfinished = folder / f"{RESULTS}.unfinished"
    try:
        unfinished.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / RESULTS)  # a report meanwhile never meets half an answer
    except OSError as error:
        raise unwritable(folder, error) from error
