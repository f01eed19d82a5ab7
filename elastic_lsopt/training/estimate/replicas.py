"""A job of several replicas as the estimates see it: one replica is a job of its own, and the rule keeps Vectors."""

from __future__ import annotations

import re
from dataclasses import replace

from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.rules import rule_of

WITH_FEW_BITS = 2
"""Vectors that a format in few bits keeps: rounding's rest, and the reference."""


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
    kept, _, within = rule_of(config).facts.memory.partition(";")
    return int(kept) + few + span, sum(map(int, re.findall(r"\d+", within))) + (span > 0)


def sent_between(config: TrainConfig, vector_bytes: int) -> int:
    """Bytes that a rank sends to other replicas per step, for a mean of all: twice its share but for its own part."""
    replicas = replicas_of(config)
    if replicas == 1:
        return 0
    told, rule = read_consensus(config.consensus or {}).told, rule_of(config)
    return round(2 * (replicas - 1) / replicas * vector_bytes * told.bits / 32 / rule.tau)
