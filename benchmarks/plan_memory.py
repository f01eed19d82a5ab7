"""`elastic-lsopt plan` beside real processes: the peak of a rank's memory as it says it, and as the allocator gives it.

A setting is a job's settings, built and stepped as `elastic-lsopt train` does. What an engine keeps between two steps
is counted tensor by tensor; how far a step rises above that is read from the C library's own account after each
operation, so gathers, DDP's and DeepSpeed's buffers and gloo's copies are in it. The least of some steps counts, since
gloo's threads hold finished buffers for a while.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.workers import on_ranks
from elastic_lsopt.api.engine import Engine
from elastic_lsopt.backends.backend import local
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.optimizers import registry
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.training.building.engines import build_engine
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.estimate.job import on_world
from elastic_lsopt.training.estimate.look import look_at_model
from elastic_lsopt.world import World
from tests.cases.memory import bytes_of

MODEL = {
    "model_type": "llama", "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4,
    "intermediate_size": 512,
}  # fmt: skip
TOY = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
WEIGHTS = {"offload_param": {"device": "cpu", "pin_memory": False}}


def zero(stage: int, offload: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A DeepSpeed JSON whose buckets do not hide a small model."""
    sizes = {"reduce_bucket_size": 500_000, "stage3_param_persistence_threshold": 500}
    return {"zero_optimization": {"stage": stage, "overlap_comm": False, **sizes, **(offload or {})}}


SAM = {"method": "sam", "rho": 0.05}
LORA = {"r": 8, "alpha": 16.0, "target_modules": "all-linear"}
FLAT = {"landscape": {"method": "flat_lora", "sigma": 0.05}, "landscape_space": "merged"}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicated_1_adamw": (1, {}),
    "ddp_2_sam": (2, {"landscape": SAM}),
    "fsdp2_1_adamw": (1, {"backend": "fsdp2"}),
    "fsdp2_2_sam_bf16": (2, {"backend": "fsdp2", "landscape": SAM, "bf16": True}),
    "fsdp2_2_checkpointing": (2, {"backend": "fsdp2", "activation_checkpointing": True}),
    "zero1_2_bf16": (2, {"backend": "deepspeed", "deepspeed": zero(1), "bf16": True}),
    "zero2_2_sam": (2, {"backend": "deepspeed", "deepspeed": zero(2), "landscape": SAM}),
    "zero3_2_sam_checkpointing": (
        2, {"backend": "deepspeed", "deepspeed": zero(3), "landscape": SAM, "activation_checkpointing": True},
    ),
    "replicated_1_lora_sam": (1, {"lora": LORA, "landscape": SAM}),
    "fsdp2_2_lora_bf16_base": (2, {"backend": "fsdp2", "lora": LORA | {"base_dtype": "bf16"}, "bf16": True}),
    "fsdp2_2_flat_lora": (2, {"backend": "fsdp2", "lora": LORA, **FLAT}),
    "fsdp2_2_offload": (2, {"backend": "fsdp2", "fsdp_cpu_offload": True, "landscape": SAM}),
    "zero2_2_offload": (2, {"backend": "deepspeed", "deepspeed": zero(2, OPTIMIZER), "landscape": SAM}),
    "zero3_2_offload": (2, {"backend": "deepspeed", "deepspeed": zero(3, OPTIMIZER | WEIGHTS), "bf16": True}),
}  # fmt: skip
"""Name -> ranks, and the job's settings beside those of `job`."""
STEPS = 3


def job(settings: Mapping[str, Any], folder: Path, *, toy: bool = False) -> TrainConfig:
    """A causal language model on a file of bytes: two micro-batches per rank at two ranks."""
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(60_000)))
    return TrainConfig(
        model=TOY if toy else MODEL, dataset=str(text), output_dir=str(folder / "run"), max_steps=8, eval_fraction=0.0,
        block_size=32 if toy else 64, per_device_train_batch_size=2 if toy else 4,
        global_batch_size=8 if toy else 16, **settings,
    )  # fmt: skip


def engine_of(config: TrainConfig) -> tuple[Engine, list[MicroBatch]]:
    """The job's engine, and this rank's micro-batches of a step (collective)."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name, own = config.landscape["method"], {k: v for k, v in config.landscape.items() if k != "method"}
    data = build_data(config)
    engine = build_engine(
        config, registry.build(name, **own), data, World(rank, size, torch.device("cpu"), dist.HashStore()), 10_000
    )
    at_once = config.per_device_train_batch_size
    units = [
        MicroBatch(u, data.collate([data.train[u * at_once + i] for i in range(at_once)]))
        for u in range(rank, config.global_batch_size // at_once, size)
    ]
    return engine, units


def measure(settings: Mapping[str, Any], toy: bool) -> dict[str, int]:
    """Bytes in use at the peak of a step, and by what the engine keeps between two (collective)."""
    with tempfile.TemporaryDirectory() as folder:
        engine, units = engine_of(job(settings, Path(folder), toy=toy))
        for _ in range(2):
            engine.train_batch(units)  # makes the base's state and the framework's buffers
        peak, rest = bytes_of(lambda: engine.train_batch(units), STEPS)
        kept = held(engine)
    return kept | {"peak": sum(kept.values()) + peak - rest}


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the tensors that the engine keeps between two steps, each storage once."""
    backend, seen = engine.backend, set[int]()

    def bytes_in(tensors: Iterable[Tensor | None]) -> int:
        total = 0
        for t in tensors:
            if t is not None and (storage := local(t).untyped_storage())._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
        return total

    parameters = list(engine.module.parameters())
    state = [t for own in backend.base.state.values() for t in own.values()]  # type: ignore[union-attr]
    wrapper = getattr(backend, "_wrapper", None)
    figures = {
        "weights": bytes_in([getattr(p, "ds_tensor", p) for p in parameters if p.requires_grad]),
        "frozen weights": bytes_in([getattr(p, "ds_tensor", p) for p in parameters if not p.requires_grad]),
        "master weights": bytes_in(backend.slots),
        "optimizer state": bytes_in(t for t in state if isinstance(t, Tensor) and t.dim()),
        "gradient": bytes_in([p.grad for p in parameters] + [getattr(wrapper, "grad_partitions_flat_buffer", None)]),
    }
    buckets = [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()]
    figures["communication buffers"] = bytes_in(b for b in buckets if isinstance(b, Tensor))
    figures |= held_beside(wrapper, bytes_in)
    if isinstance(engine.backend.forward, nn.parallel.DistributedDataParallel):
        told = engine.backend.forward._get_ddp_logging_data()
        figures["communication buffers"] += sum(int(n) for n in told["rebuilt_bucket_sizes"].split(","))
    return figures


def held_beside(wrapper: Any, bytes_in: Callable[[Iterable[Tensor | None]], int]) -> dict[str, int]:
    """What DeepSpeed keeps because its optimizer is on the host."""
    if not getattr(wrapper, "cpu_offload", False) and not getattr(wrapper, "offload_optimizer", False):
        return {}
    masters = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_partitioned_groups_flat
    staging = [
        *getattr(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups", ()),
        getattr(wrapper, "temp_grad_buffer_for_cpu_offload", None),
    ]
    return {
        "gradient in fp32": bytes_in(m.grad for m in masters),
        "sum of gradients": bytes_in(getattr(wrapper, "accumulated_grads_in_cpu", {}).values()),
        "offload buffers": bytes_in(staging),
        "buffer of a gradient on its way": bytes_in([getattr(wrapper, "temp_grad_buffer_for_gpu_offload", None)]),
    }


def said(world: int, settings: Mapping[str, Any], *, toy: bool = False) -> int:
    """The peak that `plan` says, in bytes: of device and host together, which on a CPU are one."""
    with tempfile.TemporaryDirectory() as folder:
        config = job(settings, Path(folder), toy=toy)
        ours = on_world(config, look_at_model(config), world)
    places = ours.memory, ours.offloaded
    for_a_while = (sum(sum(getattr(p, phase).values()) for p in places) for phase in ("in_pass", "in_step"))
    return sum(sum(p.kept.values()) for p in places) + max(for_a_while)


def run() -> dict[str, object]:
    """All settings, one after another, each in processes of its own; `off` is how far the plan is from the truth."""
    figures: dict[str, object] = {}
    for name, (world, settings) in SETTINGS.items():
        truth = on_ranks("benchmarks.plan_memory:measure", processes=world, settings=settings, toy=False)["peak"]
        ours = said(world, settings)
        figures |= {f"{name}_off": abs(ours / truth - 1), f"{name}_bytes": truth, f"{name}_plan_bytes": ours}
    return figures
