"""From the settings to the rule of consensus and to each replica's own, and whether the job has what the rule needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.consensus import registry as rules
from elastic_lsopt.consensus.needs import refuse_unmet
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers.registry import methods
from elastic_lsopt.oracle.method import Method


def rule_of(config: TrainConfig) -> Rule:
    """The rule that the settings describe. Raises SettingError for one that is not known or does not take its
    values."""
    assert config.consensus is not None
    block = read_consensus(config.consensus)
    try:
        return rules.build(block.rule, **block.hyperparameters)
    except UserError as error:
        key = next((k for k in block.hyperparameters if str(error).startswith(f"{k}=")), "rule")
        raise SettingError(f"consensus.{key}", f"consensus: {error}") from None


def refuse_unmet_rule(config: TrainConfig, method: Method, base: torch.optim.Optimizer) -> None:
    """Raise SettingError where the job's rule of consensus needs another method, base or format of exchanges."""
    if config.consensus is None:
        return
    told = read_consensus(config.consensus).told
    try:
        refuse_unmet(rule_of(config), methods.name_of(type(method)), base, bits=told.bits, top_k=told.top_k)
    except UserError as error:
        raise SettingError("consensus.rule", str(error)) from None


def of_replica(config: TrainConfig, number: int) -> TrainConfig:
    """The settings of one replica: its own folder; the first alone exports and tells reporters of the world outside."""
    if not number:
        return config
    reporters = tuple(name for name in config.report_to if name == "tensorboard")
    folder = Path(config.output_dir) / f"replica-{number}"
    return replace(config, output_dir=str(folder), export=False, report_to=reporters)
