"""A language model for whole jobs: small, without transformers, with what a test wants to go wrong."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """A tuple, because FSDP2 finds the tensors of an output in the containers that torch knows, and in no others."""

    logits: Tensor


class TinyLM(nn.Module):
    """Token t is predicted from tokens t and t-1, so that a few steps teach it something.

    `pause_s` sleeps in each forward; `fail_rank` raises there in forward number `fail_at`.
    """

    def __init__(
        self, width: int = 12, depth: int = 2, dropout: float = 0.0, pause_s: float = 0.0, fail_rank: int = -1,
        fail_at: int = 6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 257)
        self._pause_s, self._fail, self._forwards = pause_s, (fail_rank, fail_at), 0

    def forward(self, input_ids: Tensor) -> Output:
        self._forwards += 1
        time.sleep(self._pause_s)
        if (int(os.environ.get("RANK", "0")), self._forwards) == self._fail:
            raise ArithmeticError("the model of the user is broken")
        h = self.embedding(input_ids)
        h = h + torch.roll(h, 1, dims=1)
        for block in self.blocks:
            h = block(h)
        return Output(logits=self.head(h))


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(torch.tanh(self.linear(self.norm(h))))
