"""What is measured: a small Llama of a stated size on random tokens, as an engine of each backend.

    TOY     a few thousand parameters: the tests, so that no benchmark rots
    CPU     10.2M parameters, 2,048 tokens a unit
    GPU     368M parameters in bf16, 8,192 tokens a unit
    LARGE   1.04B parameters in bf16, 8,192 tokens a unit

Every comparison puts two engines on one backend (`beside`): the same weights, the same memory, another method.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.oracle.losses.loss import Loss, causal_lm_loss
from elastic_lsopt.training.building.models import blocks

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"
LOSS = causal_lm_loss()  # also what an engine takes for this model by itself


@dataclass(frozen=True)
class Size:
    """A Llama and its unit of work; `pairs` is how many pairs of times a comparison takes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int
    sequence: int
    samples: int
    bf16: bool = False
    pairs: int = 7


TOY = Size(16, 1, 32, 2, 32, 8, 2, pairs=2)
CPU = Size(384, 4, 1024, 6, 4096, 256, 8)
GPU = Size(1024, 24, 2736, 16, 32_000, 1024, 8, bf16=True, pairs=15)
LARGE = Size(2048, 18, 5504, 16, 32_000, 1024, 8, bf16=True, pairs=9)
SIZES = {"toy": TOY, "cpu": CPU, "gpu": GPU, "large": LARGE}


def llama(size: Size) -> nn.Module:
    """The model, the same weights in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, intermediate_size=size.intermediate,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=size.vocabulary,
        max_position_embeddings=size.sequence, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(shape).to(device())


def units(size: Size, count: int) -> list[dict[str, Tensor]]:
    """This rank's micro-batches."""
    torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))
    ids = [torch.randint(size.vocabulary, (size.samples, size.sequence), device=device()) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """The base optimizer: the cheapest with a state, so that no cost of a method hides behind it."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def engine(
    kind: str,
    size: Size,
    method: Any,
    *,
    base: Any = momentum,
    keep: Sequence[Any] = (),
    model: nn.Module | None = None,
    consensus: Any = None,
) -> lso.Engine:
    """An engine of that kind: plain, ddp, fsdp2 (a group a block), zero1, zero2 or zero3 (the ready configs)."""
    model = llama(size) if model is None else model
    if kind.startswith("zero"):
        config = json.loads((CONFIGS / f"{kind}.json").read_text()) | {"bf16": {"enabled": size.bf16}}
        return lso.initialize(
            model=model, config=config, method=method, base=base, loss_fn=LOSS, keep=keep, consensus=consensus
        )
    loss = LOSS
    if kind == "fsdp2":
        _shard(model, size)
    else:
        loss = _autocast(size)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
    return lso.Engine(
        backend_for(model, base([p for p in model.parameters() if p.requires_grad])), method, loss_fn=loss, keep=keep,
        consensus=consensus,
    )  # fmt: skip


def beside(other: lso.Engine, method: Any, **more: Any) -> lso.Engine:
    """Another method on the same backend: the same weights at the same addresses."""
    return lso.Engine(other.backend, method, loss_fn=other.loss, **more)


def _shard(model: nn.Module, size: Size) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in [*blocks(model), model]:
        fully_shard(block, **({"mp_policy": policy} if size.bf16 else {}))


def _autocast(size: Size) -> Loss:
    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=size.bf16):
            return LOSS.forward(model, batch)

    return Loss(forward, LOSS.criterion, LOSS.count)
