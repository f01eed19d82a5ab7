"""The `elastic:` block: who may come and go, what happens to batch and rate then, what keeps the state alive.

    ElasticConfig(min_nodes=2, max_nodes=8, policy="scale_batch", reference_workers=4, ramp_samples=4096)

It stands in the job's YAML, never inside a DeepSpeed JSON (DeepSpeed has removed its own `elasticity`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.ranges import BLOCK, Count, CountOrZero, Flag, Name, NotNegative, Positive, SettingError

Endpoint = Annotated[str, Field(pattern=r"^[^:/\s]+:\d{1,5}$", strict=True)]
Witness = Annotated[str, Field(pattern=r"^etcd://[^:/\s]+:\d{1,5}$", strict=True)]
Rule = Literal["linear", "sqrt", "adascale", "none"]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ElasticConfig:
    """A job whose nodes come and go in mid-training. Raises as `TrainConfig` does."""

    # Members.
    min_nodes: Count = 1
    """Nodes below which the job waits, its state kept in memory."""
    max_nodes: Count = 64
    """Nodes above which a newcomer waits as a spare; >= min_nodes."""

    # Batch and rate after a change of members.
    policy: Literal["keep_batch", "scale_batch"] = "keep_batch"
    """keep_batch: global batch and rate stay exactly as they are, at any world size; scale_batch: micro-batches a
    worker stay, the batch follows the world and the rate follows lr_rule."""
    reference_workers: Count | None = None
    """Workers for which global_batch_size and learning_rate were chosen; for scale_batch, which needs it."""
    lr_rule: Rule | None = None
    """With k the batch over global_batch_size: linear (rate x k), sqrt (rate x sqrt k; Adam's betas and epsilon with
    it), adascale (rate x the measured gain), none; null: linear for sgd, sqrt for adam and adamw."""
    ramp_samples: CountOrZero = 0
    """Samples over which the hyper-parameters go from old to new after a change; 0: at once."""
    min_global_batch_size: Count | None = None
    """Smallest global batch under scale_batch; smaller worlds hold it by accumulation."""
    max_global_batch_size: Count | None = None
    """Largest global batch under scale_batch; larger worlds hold it with fewer micro-batches a worker."""
    min_learning_rate: NotNegative | None = None
    """Smallest peak rate that lr_rule may give; held by accumulation (a larger batch)."""
    max_learning_rate: Positive | None = None
    """Largest peak rate that lr_rule may give; held by a smaller batch."""
    max_accumulation: Count | None = None
    """Micro-batches that a worker may run in a step; a world too small for its batch is refused by name; null: no
    limit."""

    # State that survives.
    mirror_every: Count = 1
    """Steps between versions of the state in another node's memory; k: at most k steps are done again."""
    copies: Count = 1
    """Other nodes that hold each version; that many may be lost at once."""
    mirror_gib: NotNegative = 2.0
    """Host memory in GiB that a rank's versions, own and held for others, may take on a slow network; three of each at
    least."""

    # Time limits.
    lease_s: Positive = 2.0
    """Seconds without a quorum after which a node stops its workers; a silent node is evicted after twice that."""
    hang_timeout_s: Positive = 30.0
    """Seconds without a worker's heartbeat, or until its main thread has noticed a new generation, after which it is
    killed; longer than the longest step with its evaluation. A collective fails after ten times that."""
    join_debounce_s: NotNegative = 0.3
    """Seconds to wait for further newcomers before they are let in together."""
    drain_timeout_s: Positive = 30.0
    """Seconds that a leaving worker has to finish its step and hand its state over."""
    join_timeout_s: Positive = 600.0
    """Seconds that a node seeks the job before it gives up. (A job waits for min_nodes without a limit.)"""

    # How nodes find and trust each other.
    endpoint: Endpoint | None = None
    """host:port of the first node's store, the same on all nodes; null: what the launcher says, or one node only."""
    address: Name | None = None
    """Address that this node's store listens on, and no other; null: 127.0.0.1 for a job of one node."""
    secret_file: Name | None = None
    """File whose bytes sign every record of the job; null: made for a job on one machine."""
    witness: Witness | None = None
    """etcd://host:port, which breaks ties of an even number of nodes; null: the node that hosts the store does."""
    preemption_notice_file: Name | None = None
    """A file whose appearance announces that this node will be taken: it is drained."""

    event_log: Flag = False
    """Write all that comes to this node's agent to `elastic/NODE.events`, from which its life can be played again."""

    # Workers that die while their node lives.
    respawn: Flag = True
    """Start a died worker again on its living node."""
    max_respawns: Count = 3
    """Workers that a node starts again in ten minutes before it leaves the job."""

    def __post_init__(self) -> None:
        for key, message in _conflicts(self):
            raise SettingError(f"elastic.{key}", message)


def _conflicts(e: ElasticConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of the values of this block that contradict each other."""
    if e.min_nodes > e.max_nodes:
        yield "min_nodes", f"min_nodes={e.min_nodes} is above max_nodes={e.max_nodes}; raise max_nodes or lower it."
    for name in ("global_batch_size", "learning_rate"):
        low, high = getattr(e, f"min_{name}"), getattr(e, f"max_{name}")
        if low is not None and high is not None and low > high:
            yield f"min_{name}", f"min_{name}={low:g} is above max_{name}={high:g}; raise the one or lower the other."
    if e.policy == "scale_batch" and e.reference_workers is None:
        yield (
            "policy",
            "policy=scale_batch needs reference_workers: the number of workers for which global_batch_size and "
            "learning_rate were chosen.",
        )
    if e.policy == "keep_batch":
        for key in (
            "reference_workers", "lr_rule", "min_global_batch_size", "max_global_batch_size",
            "min_learning_rate", "max_learning_rate",
        ):  # fmt: skip
            if getattr(e, key) is not None:
                yield key, f"{key} is for policy scale_batch: keep_batch changes no batch and no rate; remove the key."
        if e.ramp_samples:
            yield "ramp_samples", "ramp_samples is for policy scale_batch: keep_batch has nothing to ramp; remove it."
    if e.hang_timeout_s <= e.lease_s:
        yield (
            "hang_timeout_s",
            f"hang_timeout_s={e.hang_timeout_s:g} must be above lease_s={e.lease_s:g}: a step takes its time.",
        )
    if e.witness is not None and e.max_nodes == 1:
        yield "witness", "witness breaks ties between nodes, but max_nodes=1; remove it or raise max_nodes."
