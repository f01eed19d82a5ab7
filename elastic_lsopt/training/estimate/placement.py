"""What decides bytes per rank beside the model: where the weights lie, in which type, on how many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from elastic_lsopt.config.deepspeed_json import read_deepspeed_json, zero_stage
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.estimate.size import Count

FP32 = 4
"""Bytes of a master weight, of an optimizer's state, of a Vector's element."""


@dataclass(frozen=True, kw_only=True)
class ZeroSizes:
    """DeepSpeed's own limits, in elements, with the defaults of 0.19.8."""

    reduce_bucket: int = 500_000_000
    overlap: bool = False
    persistence: int = 100_000
    """Stage 3: parameters up to this size stay gathered between steps."""
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    """Stage 3: what is needed again before so many elements have been used is not let go of."""

    @classmethod
    def of(cls, given: Mapping[str, Any], stage: int) -> ZeroSizes:
        """Of a JSON's `zero_optimization`; `auto` and absence are the defaults."""
        keys = {
            "reduce_bucket": "reduce_bucket_size", "persistence": "stage3_param_persistence_threshold",
            "prefetch": "stage3_prefetch_bucket_size", "live": "stage3_max_live_parameters",
            "reuse": "stage3_max_reuse_distance",
        }  # fmt: skip
        said = {name: int(given[key]) for name, key in keys.items() if given.get(key, "auto") != "auto"}
        overlap = given.get("overlap_comm", "auto")
        return cls(**said, overlap=stage == 3 if overlap in ("auto", None) else bool(overlap))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`backend` on `world` ranks, in `replicas` groups of them that each hold the vector once (HSDP)."""

    backend: Literal["replicated", "fsdp2", "deepspeed"]
    world: int
    stage: int = 0
    """Of ZeRO, for deepspeed."""
    bf16: bool = False
    base_bf16: bool = False
    """Frozen weights are kept in bf16 (under DeepSpeed all weights are as it computes)."""
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    replicas: int = 1
    reshard_after_forward: bool | int = True
    zero: ZeroSizes = field(default_factory=ZeroSizes)

    @classmethod
    def of(cls, config: TrainConfig, world: int) -> Placement:
        """The job's own on so many ranks."""
        settings = {} if config.deepspeed is None else read_deepspeed_json(config.deepspeed)
        stage, zero = zero_stage(settings), settings.get("zero_optimization", {})
        return cls(
            backend=config.backend, world=world, stage=stage, bf16=config.bf16, replicas=config.fsdp_replicas,
            base_bf16=config.lora is not None and config.lora.base_dtype == "bf16",
            optimizer_on_host=config.fsdp_cpu_offload or _on_host(zero.get("offload_optimizer")),
            weights_on_host=config.fsdp_cpu_offload or _on_host(zero.get("offload_param")),
            reshard_after_forward=config.fsdp_reshard_after_forward, zero=ZeroSizes.of(zero, stage),
        )  # fmt: skip

    @property
    def sharded(self) -> bool:
        """Whether masters and optimizer state are."""
        return self.backend == "fsdp2" or (self.backend == "deepspeed" and self.stage > 0)

    @property
    def gathers(self) -> bool:
        """Whether the weights themselves are sharded, so that each forward gathers them."""
        return self.backend == "fsdp2" or (self.backend == "deepspeed" and self.stage == 3)

    @property
    def shards(self) -> int:
        """Ranks that hold the vector once together."""
        return self.world // self.replicas if self.sharded else 1

    @property
    def compute(self) -> int:
        """Bytes of a weight in the forward."""
        return 2 if self.bf16 else FP32

    @property
    def working(self) -> int:
        """Bytes of a trained weight as it is kept between passes: replicated and fsdp2 keep fp32 and cast."""
        return self.compute if self.backend == "deepspeed" else FP32

    @property
    def frozen(self) -> int:
        """Bytes of a frozen weight as it is kept."""
        return 2 if self.base_bf16 else self.working

    def in_forward(self, count: Count) -> int:
        """Bytes of these weights where a forward uses them."""
        return self.compute * count.trained + min(self.compute, self.frozen) * count.frozen

    def share(self, elements: int) -> int:
        """The elements of which this rank keeps master and optimizer state."""
        return ceil(elements / self.shards)


def _on_host(offload: Any) -> bool:
    """Whether DeepSpeed's block moves what it is about to the host."""
    return isinstance(offload, Mapping) and offload.get("device") == "cpu"
