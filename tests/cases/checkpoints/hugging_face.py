"""Cases of Hugging Face's folders on sharded parameters: read, train, write, and what transformers says of it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.engine import Engine
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building import engines as building
from elastic_lsopt.training.building.engines import build_engine
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.world import World
from tests.cases import engines
from tests.cases.elastic.jobs import this_world

IDS = torch.arange(24).view(2, 12) * 7 % 257
SMALL = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 24, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "sliding_window": 8},
    "mistral": {"num_key_value_heads": 1, "intermediate_size": 24, "sliding_window": None},
    "gpt2": {},
    "bert": {"intermediate_size": 24},
    "mixtral": {"num_key_value_heads": 1, "intermediate_size": 24, "num_local_experts": 3},
}
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"backend": "replicated"},
    "fsdp2": {"backend": "fsdp2"},
    "hsdp": {"backend": "fsdp2", "fsdp_replicas": 2},
    "zero2": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
}


def config_of(kind: str, folder: str, **more: Any) -> TrainConfig:
    """A job on three lines of text, whose tokens are bytes."""
    text = Path(folder).parent / f"text-{dist.get_rank()}.txt"
    text.write_text("the same lines for everyone\n" * 40)
    settings = {
        "dataset": str(text), "output_dir": folder, "max_steps": 2, "block_size": 12, "eval_fraction": 0.0,
        "global_batch_size": 4, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.5,
    }  # fmt: skip
    if "task" not in more:
        more["task"] = "causal_lm"
    return TrainConfig(**settings | BACKENDS[kind] | more)


def build(config: TrainConfig, world: World | None = None) -> Engine:
    data = build_data(config)
    return build_engine(config, lso.SAM(rho=0.05), data, world or this_world(), total_samples=100)


def logits_of(forward: Any) -> torch.Tensor:
    with torch.no_grad():
        return forward(input_ids=IDS).logits.float()


def close(engine: Engine) -> None:
    engines.close(engine)


def save(folder: str, model_type: str, dtype: str = "float32") -> None:
    """A small random model as transformers saves it, in files of 20 kB (rank 0; the others wait)."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if dist.get_rank() == 0:
        torch.manual_seed(1)
        shape = CONFIG_MAPPING[model_type](**SMALL | SHAPES[model_type], initializer_range=0.3)
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size="20kB")
    dist.barrier()


def loads_trains_and_exports(path: str, model_type: str, kind: str, dtype: str = "float32") -> dict[str, Any]:
    """How far this engine's logits are from those of transformers' own load, before two steps and after an export."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder, out = f"{path}/{model_type}", f"{path}/{model_type}-{kind}-out"
    save(folder, model_type, dtype)
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    engine = build(config_of(kind, out, model_name_or_path=folder))
    engine.module.eval()
    loaded = (logits_of(engine.backend.forward) - theirs).abs().max().item()
    engine.module.train()
    losses = [engine.train_batch([{"input_ids": IDS, "labels": IDS}]) for _ in range(2)]
    engine.module.eval()
    ours = logits_of(engine.backend.forward)
    export_huggingface(engine.backend, engine.module, out, shard_bytes=20_000)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    exported = (logits_of(again) - ours).abs().max().item()
    close(engine)

    def keys(where: str) -> list[str]:
        files = [safe_open(file, "pt") for file in Path(where).glob("*.safetensors")]
        return sorted(key for file in files for key in file.keys())  # noqa: SIM118

    return {
        "loaded": loaded, "exported": exported, "trained": (ours - theirs).abs().max().item(),
        "finite": all(math.isfinite(loss) for loss in losses), "same_keys": keys(out) == keys(folder),
    }  # fmt: skip


def first_weights(path: str, kind: str, model_type: str, whole: bool = False) -> dict[str, Any]:
    """A digest of what each parameter of a model from scratch begins with; with `whole`, the values."""
    model = {"model_type": model_type} | SMALL | SHAPES[model_type]
    engine = build(config_of(kind, f"{path}/out", model=model, seed=5))
    backend, found = engine.backend, {}
    names = [p.name for p in backend.layout.parameters]
    for name, value in zip(names, backend.all_gather(backend.masters, range(len(names)), torch.float32), strict=True):
        flat = value.flatten()
        found[name] = flat.tolist() if whole else hashlib.blake2b(flat.numpy().tobytes()).hexdigest()
    close(engine)
    return found


def masters_equal_the_files(path: str, kind: str) -> bool:
    """Computing in bf16, from files of fp32: whether every master has all of its bits."""
    from safetensors.torch import load_file

    save(f"{path}/model", "llama")
    engine = build(config_of(kind, f"{path}/out", model_name_or_path=f"{path}/model", bf16=True))
    files = {k: v for file in Path(f"{path}/model").glob("*.safetensors") for k, v in load_file(file).items()}
    layout, equal, finer = engine.backend.layout, True, False
    for piece, master in zip(layout.pieces, engine.backend.masters, strict=True):
        there = files[layout.parameters[piece.parameter].name].flatten()[piece.offset : piece.offset + piece.length]
        equal = equal and torch.equal(master, there)
        finer = finer or not torch.equal(there, there.bfloat16().float())
    close(engine)
    return equal and finer


def frozen_parts(path: str, kind: str) -> float:
    """How far the logits are from transformers' own where a layer and the embedding are not trained."""
    from transformers import AutoModelForCausalLM

    save(f"{path}/model", "mixtral")
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(f"{path}/model").eval())
    config = config_of(kind, f"{path}/out", model_name_or_path=f"{path}/model")
    with mock.patch.object(building, "shape_and_weights", frozen(building.shape_and_weights)):
        engine = build(config)
    engine.module.eval()
    off = (logits_of(engine.backend.forward) - theirs).abs().max().item()
    trained = {p.name for p in engine.backend.layout.parameters}
    close(engine)
    assert not any(name.startswith("model.layers.0.") for name in trained) and len(trained) > 0
    return off


def frozen(build_shape: Any) -> Any:
    def built(*given: Any, **more: Any) -> Any:
        model, weights = build_shape(*given, **more)
        model.model.layers[0].requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
        return model, weights

    return built


def files_overwritten(path: str, kind: str) -> float:
    """How far the logits move when the folder that was read is written over in place."""
    save(f"{path}/model", "llama")
    engine = build(config_of(kind, f"{path}/out", model_name_or_path=f"{path}/model"))
    engine.module.eval()
    before = logits_of(engine.backend.forward)
    dist.barrier()
    if dist.get_rank() == 0:
        for file in Path(f"{path}/model").glob("*.safetensors"):
            with file.open("r+b") as out:
                out.write(bytes(file.stat().st_size))
    dist.barrier()
    moved = (logits_of(engine.backend.forward) - before).abs().max().item()
    close(engine)
    return moved


def peak_of_a_load(path: str, kind: str, hidden: int, layers: int) -> dict[str, float]:
    """Growth of anonymous memory while a model is loaded, in units of (this rank's shards + its largest block).

    Without what DeepSpeed makes for the optimizer meanwhile: masters and a buffer of gradients.
    """
    from benchmarks.anonymous_memory import Peak

    folder = f"{path}/large"
    shape = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
             "vocab_size": 257}  # fmt: skip
    config = config_of(kind, f"{path}/out", model_name_or_path=folder)
    if dist.get_rank() == 0:
        build_model(config_of(kind, f"{path}/out", model=shape)).save_pretrained(folder, max_shard_size="20MB")
    dist.barrier()
    data = build_data(config)
    growths: list[int] = []

    def started(*given: Any, **more: Any) -> Any:
        peaks.__exit__()
        growths.append(peaks.bytes)
        engine = initialize(*given, **more)
        peaks.__enter__()
        return engine

    import deepspeed

    initialize, peaks = deepspeed.initialize, Peak()
    with mock.patch.object(deepspeed, "initialize", started), peaks:
        engine = build_engine(config, lso.Plain(), data, this_world(), total_samples=100)
    numels = [p.numel for p in engine.backend.layout.parameters]
    of_block = [p.numel for p in engine.backend.layout.parameters if ".layers.0." in p.name]
    unit = 4 * (sum(numels) / dist.get_world_size() + max(sum(of_block), *numels))
    close(engine)
    return {"peak": (sum(growths) + peaks.bytes) / unit, "unit_bytes": unit}


def the_pages_program(path: str, program: str) -> float:
    """The `load` of docs/large-models.md: how far its logits are from transformers' own."""
    from transformers import AutoModelForCausalLM

    save(f"{path}/model", "llama")
    names: dict[str, Any] = {}
    exec(program, names)
    backend = names["load"](f"{path}/model", torch.device("cpu"))
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(f"{path}/model").eval())
    return (logits_of(backend.module.eval()) - theirs).abs().max().item()
