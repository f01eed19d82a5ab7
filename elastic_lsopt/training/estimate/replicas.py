"""A job of several replicas as the estimates see it: one replica is a job of its own, and the rule keeps Vectors."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from elastic_lsopt.backends.peers.formats import format_of
from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.rules import rule_of

WITH_FEW_BITS = 2
"""Vectors that a format in few bits keeps at most: rounding's rest, and the reference."""
LONG = 64
"""Steps of a format in a row that is long enough to measure its bytes by."""


def replicas_of(config: TrainConfig) -> int:
    """Replicas of the job."""
    return 1 if config.consensus is None else read_consensus(config.consensus).replicas


def one_replica(config: TrainConfig) -> TrainConfig:
    """The settings of one of the replicas, as if it were a job."""
    if config.consensus is None:
        return config
    replicas = replicas_of(config)
    share, workers = config.global_batch_size // replicas, max(1, config.workers // replicas)
    return replace(config, consensus=None, global_batch_size=share, workers=workers)


def vectors_of_rule(config: TrainConfig) -> tuple[int, int]:
    """Vectors that the rule of consensus and the span of the disagreement keep, and how many more an exchange takes."""
    if config.consensus is None:
        return 0, 0
    block = read_consensus(config.consensus)
    told, span = block.told, block.disagreement_span
    few = WITH_FEW_BITS if told.bits < 32 or told.top_k is not None else 0
    rule = rule_of(config)
    kept, _, within = rule.facts.memory.partition(";")
    parts = [int(n) / (rule.fragments if of_part else 1) for n, of_part in re.findall(r"(\d+)(/P)?", within)]
    return int(kept) + few + span, math.ceil(sum(parts)) + (span > 0)


def sent_between(config: TrainConfig, vector_bytes: int) -> int:
    """Bytes that a rank sends to other replicas per step, on average; `vector_bytes` are those of its shard in fp32."""
    replicas = replicas_of(config)
    if replicas == 1:
        return 0
    told, rule = read_consensus(config.consensus or {}).told, rule_of(config)
    form = format_of(told.bits, told.top_k)
    vectors = replicas - 1 if form.sparse else rule.sent_vectors(replicas)
    row = torch.zeros(1, LONG * form.step)
    of_fp32 = form.encode(row).nbytes / row.nbytes  # scales and places included
    return round(vectors * vector_bytes * of_fp32 / rule.tau)
