"""The `consensus:` block: replicas that take their own steps, and every tau of them pull on each other.

    consensus: {rule: grawa, replicas: 4, tau: 32, pull: 0.5}
    consensus: {rule: diloco, replicas: 2, tau: 100, exchange: {bits: 4}, exchange_timeout_s: 60}

Keys that are not named here are the rule's own hyper-parameters. Who knows the rules checks their names and the keys'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.ranges import BLOCK, Count, CountOrZero, Name, Positive, SettingError

if TYPE_CHECKING:
    from elastic_lsopt.config.settings import TrainConfig


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ExchangeConfig:
    """How numbers travel between replicas."""

    bits: Literal[32, 16, 8, 4, 2] = 32
    """Of a number on its way; below 32 with error feedback."""
    top_k: Count | None = None
    """Of each 4096 numbers only the so many largest travel, with error feedback; null: all."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ConsensusConfig:
    """Replicas that drift apart and pull on each other. Raises as `TrainConfig` does."""

    rule: Name
    """The rule of consensus: local_sgd, easgd, lsgd, mgrawa, lgrawa, dppf, diloco … or an import path."""
    replicas: Annotated[Count, Field(ge=2)]
    """Replicas of the job, each of which trains on global_batch_size / replicas samples per step; >= 2."""
    exchange: ExchangeConfig | None = None
    """How numbers travel between replicas, with error feedback: {bits: 16, 8, 4 or 2}, {top_k: 64} (of each 4096 the so
    many largest) or both; null: as they are."""
    exchange_timeout_s: Positive = 30.0
    """Seconds that an exchange may take; half of them for others to come."""
    steps: Literal["by_size", "by_speed"] = "by_size"
    """What makes a replica's share of the steps: its ranks, or its measured samples per second (then two runs of the
    same job differ)."""
    disagreement_span: CountOrZero = 0
    """Of so many of the last exchanges each replica keeps its difference from the mean, a Vector each, to see which
    share of its gradient lies in their span; 0: none."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The rule's own, tau among them."""

    @property
    def told(self) -> ExchangeConfig:
        """How numbers travel."""
        return self.exchange or ExchangeConfig()


OWN = tuple(name for name in ConsensusConfig.__dataclass_fields__ if name != "hyperparameters")


def read_consensus(block: Mapping[str, Any]) -> ConsensusConfig:
    """The block with its defaults. Raises SettingError, with the key, for a value that cannot stand."""
    own = {k: v for k, v in block.items() if k in OWN}
    for key in ("rule", "replicas"):
        if key not in own:
            raise SettingError(
                "consensus", f"consensus needs {key}, such as {{rule: local_sgd, replicas: 2, tau: 32}}."
            )
    rest = {k: v for k, v in block.items() if k not in OWN}
    try:
        return TypeAdapter(ConsensusConfig).validate_python({**own, "hyperparameters": rest})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["consensus", *(str(part) for part in first["loc"])])
        wish = first["msg"].removeprefix("Input should be ")
        raise SettingError(place, f"{place}={first['input']!r} must be {wish}.") from None


def consensus_conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of what a job with the block does not go with."""
    if c.consensus is None:
        return
    block = read_consensus(c.consensus)
    replicas = block.replicas
    if c.global_batch_size % replicas:
        yield (
            "consensus.replicas",
            f"consensus.replicas={replicas} must divide global_batch_size={c.global_batch_size}, of which each replica "
            "takes its share per step.",
        )
    if c.global_batch_size // replicas < c.per_device_train_batch_size:
        yield (
            "global_batch_size",
            f"global_batch_size={c.global_batch_size} is {c.global_batch_size // replicas} for each of {replicas} "
            f"replicas, less than per_device_train_batch_size={c.per_device_train_batch_size}; raise it or lower the "
            "micro-batch.",
        )
    if c.elastic is None and c.workers > 1 and c.workers % replicas:
        yield "consensus.replicas", f"consensus.replicas={replicas} must divide workers={c.workers}."
    if c.batch_schedule is not None:
        yield (
            "batch_schedule",
            "batch_schedule with consensus is not supported: each replica has its fixed share; remove it.",
        )
    if c.on_divergence == "rewind":
        yield (
            "on_divergence",
            "on_divergence=rewind with consensus is not supported, where the others give a replica its model anew; use "
            "stop.",
        )
    if c.lr_scheduler_type == "autodrop":
        yield (
            "lr_scheduler_type",
            "lr_scheduler_type=autodrop with consensus is not supported: each replica would drop at its own time; use "
            "cosine.",
        )
    if c.elastic is not None and c.elastic.policy != "keep_batch":
        yield (
            "elastic.policy",
            f"elastic.policy={c.elastic.policy} with consensus is not supported: a replica's batch stays; use "
            "keep_batch.",
        )
    if c.landscape.get("method") == "bi_lora":
        yield (
            "landscape",
            "landscape: bi_lora trains a second adapter against the first and is not supported with consensus.",
        )
