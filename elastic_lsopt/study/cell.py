"""One network of a study: trained until its loss is low, tested, measured. A pure function of the task.

A fully connected ReLU network in fp64, plain SGD at a constant rate. The measures see it at its last weights, on the
whole training set with the labels that it was trained on, as one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elastic_lsopt.api.attach import attach
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.oracle.losses.loss import classification_loss
from elastic_lsopt.probes.catalogue import ProbeContext
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.study.grid import Cell
from elastic_lsopt.study.label_noise import wrong_labels
from elastic_lsopt.study.measures import asked
from elastic_lsopt.training.datasets.samples import build_data

BRANCHES, FIRST_BRANCH = 4, 1 << 32
"""Other ends of the training for the mean valley, and the seed of the first one's order: no grid's own."""
IMPORTED_LATE = ("sklearn.datasets", "torch._dynamo")
"""What loading the digits and a first optimizer step import: 5 seconds, where a network may take 2."""


@dataclass(frozen=True)
class Samples:
    """`x` [n, inputs] fp64, `labels` [n] int64."""

    x: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """What a worker process is given."""

    cell: Cell
    config: StudyConfig
    measures: tuple[str, ...]


def train_and_measure(task: Task) -> dict[str, Any]:
    """The network's losses, errors, gaps and measures; None, with a reason under `reasons`, where a measure failed."""
    cell, config, began = task.cell, task.config, time.process_time()
    train, test, classes = data(config, cell.label_noise)
    torch.manual_seed(cell.seed)
    model = network(train.x.shape[1], cell.width, cell.depth, classes).double()
    start = [p.detach().clone() for p in model.parameters()]
    epochs = fit(model, train, cell, config)
    (train_loss, train_error), (test_loss, test_error) = score(model, train), score(model, test)
    converged = train_loss <= config.stop_loss
    result = {
        "converged": converged, "epochs": epochs,
        "train_loss": train_loss, "train_error": train_error, "test_loss": test_loss, "test_error": test_error,
        "gap": test_error - train_error, "loss_gap": test_loss - train_loss,
    }  # fmt: skip
    result = {key: value if isfinite(value) else None for key, value in result.items()}
    if converged:
        measured = measure(model, train, start, task)
        return result | measured | {"cpu_seconds": round(time.process_time() - began, 3)}
    reason = f"the training loss is {train_loss:.2g} after {epochs} epochs, above stop_loss={config.stop_loss:g}"
    return result | {"measures": dict.fromkeys(task.measures), "reasons": dict.fromkeys(task.measures, reason)}


def data(config: StudyConfig, label_noise: float) -> tuple[Samples, Samples, int]:
    """Training set, test set and the number of classes; the training labels that are wrong grow with the noise.

    They depend on the study's seed alone: all networks of one noise level learn the same labels, and those that are
    wrong at a low level are so at a higher one.
    """
    whole = build_data(
        TrainConfig(
            task="classification", dataset=config.dataset, eval_fraction=config.eval_fraction, output_dir="-",
            model={"import": "torch.nn:Module"}, max_steps=1,
        )
    )  # fmt: skip
    train, test = (
        Samples(torch.from_numpy(part.x).double(), torch.from_numpy(part.labels))  # type: ignore[attr-defined]
        for part in (whole.train, whole.eval)
    )
    classes = len(whole.classes)
    labels = torch.from_numpy(wrong_labels(train.labels.numpy(), classes, label_noise, config.seed))
    return Samples(train.x, labels), test, classes


def network(inputs: int, width: int, depth: int, classes: int) -> nn.Sequential:
    """`depth` hidden layers of `width` units."""
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))


def fit(model: nn.Module, train: Samples, cell: Cell, config: StudyConfig) -> int:
    """Train in place; returns the passes over the training set, each in another order."""
    one_pass = _passes(model, train, cell, cell.seed)
    for epoch in range(1, config.max_epochs + 1):
        one_pass()
        loss, _ = score(model, train)
        if loss <= config.stop_loss or not isfinite(loss):
            return epoch
    return config.max_epochs


def _passes(model: nn.Module, train: Samples, cell: Cell, seed: int) -> Callable[[], None]:
    """A function that trains for one pass; `seed` decides the orders."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=cell.learning_rate, momentum=cell.momentum, weight_decay=cell.weight_decay
    )
    order = torch.Generator().manual_seed(seed)

    def one_pass() -> None:
        for chosen in torch.randperm(len(train.labels), generator=order).split(cell.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(train.x[chosen]), train.labels[chosen]).backward()
            optimizer.step()

    return one_pass


@torch.no_grad()
def score(model: nn.Module, samples: Samples) -> tuple[float, float]:
    """The mean cross-entropy, and the share of samples that are classified wrongly."""
    logits = model(samples.x)
    return cross_entropy(logits, samples.labels).item(), (logits.argmax(1) != samples.labels).double().mean().item()


def measure(model: nn.Module, train: Samples, start: list[Tensor], task: Task) -> dict[str, Any]:
    """`measures` by name, `reasons` of those that failed, and the `measure_seconds` of each."""
    batch = {"x": train.x, "labels": train.labels}
    # Unchecked: ReLU's kinks lie so near a sharp minimum that a difference of gradients is no second derivative.
    space, oracle = attach(model, classification_loss(), [batch], seed=task.config.seed, products="kept", checked=False)

    def branches() -> list[Vector]:
        out = []
        for branch in range(BRANCHES):
            other = deepcopy(model)
            _passes(other, train, task.cell, FIRST_BRANCH + branch)()
            out.append(_vector(space, [*other.parameters()]))
        return out

    minimum = ProbeContext(
        space=space, oracle=oracle, batches=lambda: [oracle], samples=len(train.labels), initial=_vector(space, start),
        branches=branches,
    )  # fmt: skip
    measuring = Measurement(space, oracle.backend, classification_loss())
    return asked(measuring, task.measures, minimum)


def _vector(space: ParameterSpace, weights: list[Tensor]) -> Vector:
    return space.zeros().copy_(Vector(space, [w.detach().flatten() for w in weights]))
