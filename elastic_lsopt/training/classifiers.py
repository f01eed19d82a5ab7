"""A torch model that a YAML file can name: `model: {import: "elastic_lsopt.training.classifiers:mlp", args: {…}}`."""

from __future__ import annotations

from torch import nn


def mlp(inputs: int, hidden: int, classes: int) -> nn.Sequential:
    """One hidden layer: x [b, inputs] to logits [b, classes]."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
