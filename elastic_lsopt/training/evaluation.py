"""What a model reaches on held-out data: its loss; of a classifier also accuracy, F1 and measures of the user's own.

    micro-batches of the held-out part    0 1 2 3 | 4 5 6 7 | 8        rounds; micro-batch u belongs to rank u mod world

A micro-batch is padded as in training, so any world computes the same predictions. Each rank knows those of its own;
they are put together by a sum into places that are zero on all other ranks, which is exact.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.by_name import imported
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.world import World

UNITS_AT_ONCE = 8
"""Micro-batches of a rank in memory during an evaluation."""
ROWS_AT_ONCE = 8192
"""Samples whose predictions are put together in one sum."""
Metrics = Callable[[Any], Any]


@dataclass(frozen=True)
class Evaluation:
    """The mean loss, nats a token or a sample; and the metrics of a classifier by name, on rank 0 alone."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


def evaluate(
    engine: Engine, data: Data, config: TrainConfig, world: World, *, microbatch_samples: int | None = None
) -> Evaluation:
    """Of `eval_batches` micro-batches (of the job's own size, or another), or of all that is held out (collective).

    Host memory: the logits of all samples, where `compute_metrics` asks for them. Raises UserError on all ranks where
    that fails.
    """
    size = microbatch_samples or config.per_device_train_batch_size
    firsts = list(range(0, len(data.eval), size))[: config.eval_batches]

    def microbatch(i: int, number: int, idle: bool = False) -> MicroBatch:
        rows = [data.eval[j] for j in range(firsts[i], min(firsts[i] + size, len(data.eval)))]
        return MicroBatch(number, placed(data.collate(rows), world), idle)

    def rounds() -> Iterator[list[MicroBatch]]:
        at_once = UNITS_AT_ONCE * world.size
        for begin in range(0, len(firsts), at_once):
            count = min(at_once, len(firsts) - begin)
            mine = [microbatch(begin + k, k) for k in range(world.rank, count, world.size)]
            yield mine or [microbatch(begin, 0, idle=True)]

    if config.task == "causal_lm":
        return Evaluation(engine.evaluate(rounds()))
    seen: list[Tensor] = []
    whole = config.compute_metrics is not None  # else the class is enough
    loss = engine.evaluate(rounds(), lambda logits, _: seen.append((logits if whole else logits.argmax(-1)).float()))
    samples = min(len(data.eval), len(firsts) * size)
    found = _everyones(engine, seen, firsts[world.rank :: world.size], samples)
    labels = np.asarray(data.eval.labels)[:samples]  # type: ignore[attr-defined]
    return Evaluation(loss, world.on_first(lambda: _metrics(config, found, labels)) or {})


def placed(batch: dict[str, Any], world: World) -> dict[str, Any]:
    """The batch on this rank's device."""
    if world.device.type == "cpu":
        return batch
    # From pageable memory `non_blocking` means nothing: the host would wait for all that was asked of the GPU before.
    return {k: v.pin_memory().to(world.device, non_blocking=True) for k, v in batch.items()}


def classification_metrics(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """{accuracy, macro_f1} of classes [n] against labels [n].

    Macro F1 is the mean over the classes that occur in either of 2 TP / (2 TP + FP + FN), as in scikit-learn.
    """
    classes = np.union1d(predicted, labels)
    hits = [np.sum((predicted == c) & (labels == c)) for c in classes]
    sizes = [np.sum(predicted == c) + np.sum(labels == c) for c in classes]
    f1 = [2 * hit / size for hit, size in zip(hits, sizes, strict=True)]
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": float(np.mean(f1))}


def metrics_function(config: TrainConfig) -> Metrics | None:
    """What `compute_metrics` names. Raises SettingError where that is no function."""
    if config.compute_metrics is None:
        return None
    try:
        found = imported("compute_metrics", config.compute_metrics)
    except UserError as error:
        raise SettingError("compute_metrics", str(error)) from None
    if not callable(found):
        raise SettingError(
            "compute_metrics",
            f"compute_metrics={config.compute_metrics!r} is a {type(found).__name__}; name a function.",
        )
    return found


def _everyones(engine: Engine, seen: list[Tensor], firsts: list[int], samples: int) -> NDArray[np.float32]:
    """What all ranks have seen, [samples] or [samples, classes], on every rank (collective).

    `seen` has a tensor for each micro-batch of this rank, whose first sample `firsts` names.
    """
    backend = engine.backend
    shape = seen[0].shape[1:] if seen else torch.Size()
    columns, knowing = backend.sum_replica_(
        on_device([shape.numel() if seen else 0, bool(seen)], backend.device)
    ).tolist()
    out = np.zeros((samples, round(columns / knowing)), np.float32)
    for first, rows in zip(firsts, seen, strict=True):
        out[first : first + len(rows)] = rows.reshape(len(rows), -1).cpu().numpy()
    for begin in range(0, samples, ROWS_AT_ONCE):
        part = torch.from_numpy(out[begin : begin + ROWS_AT_ONCE]).to(backend.device)
        out[begin : begin + ROWS_AT_ONCE] = backend.sum_replica_(part).cpu().numpy()
    return out


def _metrics(config: TrainConfig, found: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """The metrics by name: ours, and over them those of `compute_metrics`."""
    function = metrics_function(config)
    if function is None:
        return classification_metrics(found[:, 0].astype(np.int64), labels)
    from transformers import EvalPrediction

    path = config.compute_metrics
    try:
        own = function(EvalPrediction(predictions=found, label_ids=labels))
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"compute_metrics={path} failed at {at.filename}:{at.lineno}: {reason}") from error
    if not isinstance(own, Mapping):
        raise UserError(f"compute_metrics={path} returned a {type(own).__name__}; return {{name: number}}.")
    told = {}
    for name, value in own.items():
        if str(name).removeprefix("eval_") == "loss":
            raise UserError(f"compute_metrics={path} returned {name!r}, which is the held-out loss; take another name.")
        try:
            told[str(name).removeprefix("eval_")] = float(value)
        except (TypeError, ValueError):
            raise UserError(f"compute_metrics={path}: {name!r} is {value!r:.40}, no number.") from None
    return classification_metrics(found.argmax(-1), labels) | told
