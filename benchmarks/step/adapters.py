"""What noise on the merged weights costs beside a plain step of the same adapters (Flat-LoRA; limit 1.1).

Adapters of rank 16 in every linear layer of the blocks, on the same backend, in turns. The noise of a layer is drawn in
its forward and in its backward, so its share falls as a micro-batch has more tokens: a unit has 2,048 on a CPU.
"""

from __future__ import annotations

import torch
from torch import nn

import elastic_lsopt as lso
from benchmarks.models import SIZES, Size, engine, llama, units
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.training.building.adapters import add_adapters

BACKENDS = ("ddp", "fsdp2", "zero2")
RUN_SAMPLES = 2**40
"""Of a run that has hardly begun: the noise's scale is not 0, and its cost does not depend on it."""


def adapted(size: Size) -> nn.Module:
    """The Llama with adapters, everything else frozen."""
    model = llama(size)
    add_adapters(model, LoraConfig(r=16, alpha=32), task="causal_lm", seed=0)
    return model


def compare(kind: str, size: str) -> dict[str, object]:
    """Steps of none and of flat_lora on one backend (collective)."""
    shape, batch = SIZES[size], units(SIZES[size], 1)
    base = engine(kind, shape, lso.Plain(), model=adapted(shape))
    ours = lso.Engine(base.backend, lso.FlatLoRA(), loss_fn=base.loss, total_samples=RUN_SAMPLES)
    times = rounds(shape.pairs, base=lambda: base.train_batch(batch), ours=lambda: ours.train_batch(batch))
    assert ours.last_step is not None and not ours.last_step.skipped, "a skipped step measures nothing"
    return ratio_of(times["ours"], times["base"]).figures(f"flat_lora_{kind}_of_lora_step")


def run() -> dict[str, object]:
    """All backends, one after another, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for kind in BACKENDS:
        figures |= on_ranks("benchmarks.step.adapters:compare", kind=kind, size=size)
    return figures
