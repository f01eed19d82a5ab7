"""A Hugging Face folder into shards and out again: memory of a rank beyond its shards, seconds beside safetensors.

The model is a Llama of 88M parameters in files of bf16; shards are fp32. `unit` is a rank's shards and its largest
block (or parameter). What DeepSpeed makes for the optimizer meanwhile, masters and a buffer of gradients, is left out.
The seconds are from the settings to filled shards; of a model this small half of them build its modules without memory
(`large_model` has the seconds of 1.3B). On a limited host (a memory cgroup of Linux, where this process may make one) a
load of 0.3B must pass under a limit that a whole copy per rank breaks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.anonymous_memory import Peak, anonymous_bytes
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks
from elastic_lsopt.api.engine import Engine
from elastic_lsopt.checkpoint.huggingface.drawn_weights import DrawnWeights
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from elastic_lsopt.checkpoint.huggingface.folder_weights import stored_tensors
from elastic_lsopt.checkpoint.safetensors_file import Head, write_tensors
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building import engines
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.world import World

KINDS = {
    "fsdp2": {"backend": "fsdp2"},
    "zero3": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
}
SIZES = {
    "toy": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257},
    "cpu": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "0.3b": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
}  # fmt: skip
FILE_BYTES = 64 * 2**20
CGROUP = Path("/sys/fs/cgroup/memory")
LAUNCHER_BYTES = 300 * 2**20
"""Of torchrun itself, beside the ranks."""


def config_of(folder: str, kind: str, **more: Any) -> TrainConfig:
    """A job on a few lines of text, whose tokens are bytes, that goes on from `folder`."""
    text = Path(folder).parent / f"text-{os.getpid()}.txt"
    text.write_text("the same lines for everyone\n" * 40)
    given = {"model_name_or_path": folder} if "model" not in more else {}
    return TrainConfig(
        **given | {"dataset": str(text), "output_dir": f"{folder}-out", "max_steps": 2, "block_size": 16,
                   "eval_fraction": 0.0, "global_batch_size": 4, "per_device_train_batch_size": 2, "optim": "sgd"}
        | KINDS[kind] | more
    )  # fmt: skip


def make(folder: Path, size: str) -> None:
    """A folder of random weights in bf16, one tensor in memory at a time."""
    shape = {"model_type": "llama", "vocab_size": 257} | SIZES[size]
    model: Any = build_model(config_of(str(folder), "fsdp2", model=shape), device="meta")
    weights, parts, room = DrawnWeights(model, 0), [[]], FILE_BYTES
    heads = [Head(name, torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()]
    for head in heads:
        if head.bytes > room and parts[-1]:
            parts.append([])
            room = FILE_BYTES
        parts[-1].append(head)
        room -= head.bytes
    folder.mkdir(parents=True)

    def drawn(head: Head) -> torch.Tensor:
        out = torch.empty(head.bytes // 2, dtype=torch.bfloat16)
        weights.copy_to(out, head.name, 0)
        return out

    where = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, part, map(drawn, part))
        where |= {head.name: name for head in part}
    index = {"metadata": {"total_size": sum(head.bytes for head in heads)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)


def world_here() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.HashStore())


def loaded(config: TrainConfig) -> tuple[Engine, int]:
    """The engine of a job, and how far this rank's anonymous memory rose while it was loaded."""
    import deepspeed

    data, growths, peak, initialize = build_data(config), [], Peak(), deepspeed.initialize

    def start(*given: Any, **more: Any) -> Any:
        peak.__exit__()
        growths.append(peak.bytes)
        engine = initialize(*given, **more)
        peak.__enter__()
        return engine

    with mock.patch.object(deepspeed, "initialize", start), peak:
        engine = engines.build_engine(config, lso.Plain(), data, world_here(), total_samples=100)
    return engine, sum(growths) + peak.bytes


def measure(folder: str, kind: str, pairs: int) -> dict[str, Any]:
    """Peak, export and seconds on one backend (collective)."""
    world = dist.get_world_size()
    loaded(config_of(folder, kind))  # imports and the first `fully_shard` are no part of a load
    engine, grown = loaded(config_of(folder, kind))
    numels = {p.name: p.numel for p in engine.backend.layout.parameters}
    block = sum(n for name, n in numels.items() if ".layers.0." in name)
    unit = 4 * (sum(numels.values()) / world + max(block, *numels.values()))
    with Peak() as peak:
        export_huggingface(engine.backend, engine.module, f"{folder}-{kind}-out")
    largest = torch.tensor([grown / unit, float(peak.bytes)])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    name = f"{kind}_world{world}"
    out: dict[str, Any] = {
        f"peak_{name}_of_shard_and_block": largest[0].item(), f"export_{name}_extra_bytes": int(largest[1]),
        f"unit_{name}_bytes": int(unit),
    }  # fmt: skip
    return out | (seconds(engine, folder, kind, pairs) if pairs else {})


def seconds(engine: Engine, folder: str, kind: str, pairs: int) -> dict[str, Any]:
    """From the settings to filled shards, beside safetensors, whose ranks read each file once (collective)."""
    world = dist.get_world_size()

    def ours() -> None:
        own = engines.shape_and_weights(config_of(folder, kind))[1]
        assert own is not None
        engines.fill(engine.backend, own)

    def theirs() -> None:
        from safetensors import safe_open

        files = sorted({stored.file for stored in stored_tensors(Path(folder)).values()})
        for file in files[dist.get_rank() :: world]:
            with safe_open(Path(folder) / file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensors.get_tensor(key).clone()

    times = rounds(pairs, ours=ours, theirs=theirs)
    return ratio_of(times["ours"], times["theirs"]).figures(f"load_{kind}_world{world}_of_safetensors")


# -- a limited host ----------------------------------------------------------------------------------------------------


def bytes_of_a_load(folder: str, kind: str) -> int:
    """Anonymous bytes of all ranks at the peak of a load (collective)."""
    before = anonymous_bytes()
    _, grown = loaded(config_of(folder, kind))
    total = torch.tensor([before + grown])
    dist.all_reduce(total)
    return int(total)


def whole_copies(folder: str, kind: str) -> int:
    """The usual way: every rank reads the whole model, and cuts it then."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for block in engines.blocks(model):
        fully_shard(block)
    fully_shard(model)
    return 1


def limited_host(folder: str) -> dict[str, Any]:
    """Whether a load passes under a limit that whole copies break; nothing where no memory cgroup can be made."""
    group = CGROUP / f"elastic-lsopt-{os.getpid()}"
    limit = int(on_ranks("benchmarks.loading:bytes_of_a_load", folder=folder, kind="fsdp2") * 1.05) + LAUNCHER_BYTES
    try:
        group.mkdir()
    except OSError as error:
        print(f"limited host: no memory cgroup can be made ({error.strerror})", file=sys.stderr)
        return {}
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        passed = {}
        for name, case in (("sharded", "bytes_of_a_load"), ("whole", "whole_copies")):
            try:
                on_ranks(f"benchmarks.loading:{case}", before=enter, folder=folder, kind="fsdp2")
                passed[name] = 1
            except subprocess.CalledProcessError:
                passed[name] = 0
        return {"limited_host_bytes": limit, "limited_host_load_passes": passed["sharded"],
                "limited_host_whole_copies_pass": passed["whole"]}  # fmt: skip
    finally:
        group.rmdir()


def run(size: str = "cpu", pairs: int = 7) -> dict[str, Any]:
    """Every figure, each load in processes of its own."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{size}"
        make(Path(path), size)
        for world in (2, 4):
            for kind in KINDS:
                figures |= on_ranks("benchmarks.loading:measure", processes=world, folder=path, kind=kind,
                                    pairs=pairs if world == 2 else 0)  # fmt: skip
        limited = "0.3b" if size != "toy" else size
        make(Path(folder, "limited"), limited)
        figures |= limited_host(f"{folder}/limited")
    return figures
