"""What curvature is measured on: a GPT in fp32 on the text of Python's own library, a little trained.

    TOY     a few thousand parameters: the tests
    CPU     3.2M parameters, 512 tokens a rank: a gradient takes 0.1 to 0.2 s on one core. (With 256 all products are
            dearer, a plain double backward too, 3.3 gradients: sums of gradients cost by the weight, not by the token.)
    GPU     25M parameters, 8,192 tokens a rank

The model is written out, not taken from transformers: a peer that runs on torch.func cannot take those.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from benchmarks.models import device

VOCABULARY = 128
TRAINING_STEPS = 30
Batch = tuple[Tensor, Tensor]
"""Tokens (samples, context), and the next of each."""


@dataclass(frozen=True)
class Shape:
    """A GPT and its batch; `pairs` is how many pairs of times a comparison takes."""

    width: int
    layers: int
    heads: int
    context: int
    samples: int
    pairs: int = 9


SHAPES = {
    "toy": Shape(16, 2, 2, 8, 2, pairs=2),
    "cpu": Shape(256, 4, 4, 128, 4),
    "gpu": Shape(512, 8, 8, 256, 32, pairs=25),
}


class Layer(nn.Module):
    """A transformer's layer, normalised before attention and before the perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, context, width = x.shape
        parts = self.attention(self.norm_1(x)).view(samples, context, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).reshape(samples, context, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens (samples, context) to logits (samples * context, VOCABULARY)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, shape.width), nn.Embedding(shape.context, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)).flatten(0, 1)


class TokenLoss(nn.CrossEntropyLoss):
    """The mean cross-entropy of the next token; a class of its own for those peers that ask for a torch loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target.flatten())


CRITERION = TokenLoss()


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Everybody's loss."""
    return CRITERION(model(batch[0]), batch[1])


LOSS = lso.Loss(
    lambda model, batch: model(batch[0]),
    lambda logits, batch: CRITERION(logits, batch[1]),
    lambda batch: float(batch[1].numel()),
)


def text(shape: Shape, draw: int) -> Batch:
    """Windows at random places of a module's source."""
    source = torch.tensor(list(Path(argparse.__file__).read_bytes()), device=device()) % VOCABULARY
    places = torch.Generator().manual_seed(draw)
    starts = torch.randint(len(source) - shape.context - 1, (shape.samples,), generator=places).tolist()
    windows = torch.stack([source[i : i + shape.context + 1] for i in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def own_batch(shape: Shape) -> Batch:
    """This rank's micro-batch."""
    return text(shape, dist.get_rank() if dist.is_initialized() else 0)


def trained(shape: Shape) -> GPT:
    """The same weights in every process, after TRAINING_STEPS steps of Adam: a spectrum with outliers."""
    torch.manual_seed(0)
    model = GPT(shape).to(device())
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(TRAINING_STEPS):
        optimizer.zero_grad()
        mean_loss(model, text(shape, 1000 + step)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def sharded(model: GPT) -> GPT:
    """The model under FSDP2, a group a layer."""
    from torch.distributed.fsdp import fully_shard

    for part in [*model.layers, model]:
        fully_shard(part)
    return model
