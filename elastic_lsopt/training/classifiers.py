"""Torch models that a YAML file can name: `model: {import: "elastic_lsopt.training.classifiers:mlp", args: {…}}`."""

from __future__ import annotations

from torch import nn


def mlp(inputs: int, hidden: int, classes: int) -> nn.Sequential:
    """One hidden layer: x [b, inputs] to logits [b, classes]."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def small_cnn(side: int, channels: int, classes: int) -> nn.Sequential:
    """Two convolutions of 3 x 3 and one of stride 2 between them: x [b, side * side], a grey image, to logits."""
    half = -(-side // 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * channels * half * half, classes),
    )  # fmt: skip
