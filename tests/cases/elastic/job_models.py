"""A language model for whole jobs: small, without transformers, with what a test wants to go wrong."""

from __future__ import annotations

import math
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

    `pause_s` sleeps in each forward until `hurry_file` is there, `slowly` times as long on the node of the name "slow";
    `fail_rank`, of the node, raises there in forward number `fail_at`, or, with `hang_file`, never comes back from it
    while that file is there (and removes it). With `held_file`, an elastic job's worker in another's place, which is
    number `held_from` of its node or a later one, waits for that file before it is built.
    Once a bias of the head is above `breaks_at`, the logits are NaN, as those of a model that has blown up.
    """

    def __init__(
        self, width: int = 12, depth: int = 2, dropout: float = 0.0, pause_s: float = 0.0, fail_rank: int = -1,
        fail_at: int = 6, slowly: float = 1.0, hang_file: str = "", breaks_at: float = math.inf,
        hurry_file: str = "", held_from: int = 0, held_file: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        number = os.environ.get("ELASTIC_LSOPT_WORKER", "").rpartition("-")[2]
        end = time.monotonic() + 60
        while held_file and int(number) >= held_from and not os.path.exists(held_file) and time.monotonic() < end:
            time.sleep(0.01)
        self.embedding = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 257)
        self._hang_file, self._breaks_at, self._hurry_file = hang_file, breaks_at, hurry_file
        pause_s *= slowly if os.environ.get("ELASTIC_LSOPT_NODE") == "slow" else 1.0
        self._pause_s, self._fail, self._forwards = pause_s, (fail_rank, fail_at), 0

    def forward(self, input_ids: Tensor) -> Output:
        self._forwards += 1
        if not (self._hurry_file and os.path.exists(self._hurry_file)):
            time.sleep(self._pause_s)
        if (int(os.environ.get("LOCAL_RANK", "0")), self._forwards) == self._fail:
            if not self._hang_file:
                raise ArithmeticError("the model of the user is broken")
            if os.path.exists(self._hang_file):
                os.remove(self._hang_file)
                time.sleep(1e6)
        h = self.embedding(input_ids)
        h = h + torch.roll(h, 1, dims=1)
        for block in self.blocks:
            h = block(h)
        broken = (self.head.bias.detach().max() > self._breaks_at).to(h.dtype)
        return Output(logits=self.head(h) + torch.log(1 - broken) * broken)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(torch.tanh(self.linear(self.norm(h))))
