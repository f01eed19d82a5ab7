"""Cases of the export: what every backend holds becomes a folder that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from tests.cases import engines

TOKENS = torch.arange(24).view(2, 12) % 61


def llama(tied: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def hugging_face(path: str, kind: str, tied: bool, frozen: bool = False) -> dict[str, Any]:
    """Train a small Llama, export it in files of 8 kB; compare logits, and the names that were written."""
    from transformers import AutoModelForCausalLM

    model = llama(tied)
    if frozen:
        model.model.layers[0].requires_grad_(False)  # type: ignore[union-attr]
    engine = engines.build(kind, model, lso.SAM(rho=0.1), loss_fn=None)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    for _ in range(2):
        engine.train_batch([batch])
    engine.module.eval()
    with torch.no_grad():
        logits = engine.backend.forward(input_ids=TOKENS).logits
    export_huggingface(engine.backend, engine.module, path, shard_bytes=8000)
    loaded = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        again = loaded(input_ids=TOKENS).logits
    engines.close(engine)
    files = sorted(p.name for p in Path(path).iterdir())
    names = [name for file in Path(path).glob("*.safetensors") for name in load_file(file)]
    return {
        "equal": torch.equal(logits, again), "dtype": str(again.dtype), "kind": type(loaded).__name__,
        "files": files, "head": "lm_head.weight" in names,
    }  # fmt: skip


class Plain(nn.Module):
    """Tied under two names, a buffer, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(engines.FEATURES, 5)
        self.middle = nn.Linear(5, 5)
        self.last = nn.Linear(5, engines.CLASSES)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.middle.weight
        self.last.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.middle(self.first(x)))) * self.scale


def plain_module(path: str, kind: str) -> bool:
    """Export, export again over it, load strictly into a new module: whether its outputs are the engine's."""
    torch.manual_seed(0)
    engine = engines.build(kind, Plain(), lso.Plain())
    engine.train_batch(engines.mine(engines.batches(1, 2)[0]))
    x = torch.ones(2, engines.FEATURES)
    with torch.no_grad():
        wanted = engine.backend.forward(x)
    for _ in range(2):
        export_huggingface(engine.backend, engine.module, path)
    fresh = Plain()
    fresh.load_state_dict(load_file(Path(path) / "model.safetensors"))
    engines.close(engine)
    return torch.equal(fresh(x), wanted)


def export_over(path: str) -> str:
    """What each rank is told of an export onto a folder with other files."""
    engine = engines.build("fsdp2", engines.net(), lso.Plain())
    if dist.get_rank() == 0:
        Path(path, "thesis.tex").write_text("mine")
    dist.barrier()
    try:
        export_huggingface(engine.backend, engine.module, path)
    except lso.UserError as error:
        return str(error)
    return "nothing"


class Spoilt:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder: Path) -> None:
        raise ValueError("no such token")


def spoilt(path: str) -> str:
    """What each rank raises."""
    torch.manual_seed(0)
    engine = engines.build("fsdp2", Plain(), lso.Plain())
    try:
        export_huggingface(engine.backend, engine.module, path, Spoilt())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "exported"
