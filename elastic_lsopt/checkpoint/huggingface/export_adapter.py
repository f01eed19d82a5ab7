"""The trained adapter as a folder for `peft`: adapter_config.json, adapter_model.safetensors and the tokenizer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from elastic_lsopt.backends.adapters.adversary import ADVERSARY, is_factor
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.checkpoint.folder import staging, sync
from elastic_lsopt.checkpoint.huggingface.export import TIMEOUT, attempt, refuse
from elastic_lsopt.checkpoint.huggingface.export_folder import publish
from elastic_lsopt.checkpoint.huggingface.lora import adapter_name, adapter_of, gathered
from elastic_lsopt.checkpoint.safetensors_file import Head, write_tensors
from elastic_lsopt.errors import UserError
from elastic_lsopt.space.vector import Vector

WEIGHTS = "adapter_model.safetensors"


def export_adapter(
    backend: Backend, module: nn.Module, folder: str | Path, tokenizer: Any = None, *, weights: Vector | None = None
) -> Path:
    """Write the adapter of a model to `folder` (collective); returns the folder. Each rank holds the adapter meanwhile.

    `PeftModel.from_pretrained(base, folder)` gives the trained model. `weights` are written in place of the trained
    ones (an average of them). Raises UserError where the model has no adapter, or the folder holds something else or
    cannot be written, Unsupported for adapters of other kinds than LoRA's products, on all ranks.
    """
    folder = Path(folder).resolve()
    name = adapter_of(module)
    if name is None:
        raise UserError(f"a {type(module).__name__} without adapters has none to export; use export_huggingface.")
    backend.drop_gathered()  # FSDP2 hides the shards of a gathered group
    everybody = backend.groups.job.again("export of the adapter", TIMEOUT)
    writes = backend.rank == 0 and (backend.replica == 0 or backend.groups.apart)
    try:
        attempt(folder, everybody, (lambda: refuse(folder)) if writes else None)
        trained = [p.name for p in backend.layout.parameters if name == ADVERSARY or not is_factor(p.name, ADVERSARY)]
        wholes = gathered(backend, trained, backend.masters if weights is None else weights.tensors)
        config = module.peft_config[name]  # type: ignore[index]
        named = {adapter_name(key, name): t.cpu() for key, t in wholes.items()}
        attempt(folder, everybody, (lambda: _write(folder, named, config, tokenizer)) if writes else None)
    finally:
        backend.groups.job.end(everybody)
    return folder


def _write(folder: Path, tensors: dict[str, Any], config: Any, tokenizer: Any) -> None:
    staged = staging(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        heads = [Head(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
        write_tensors(staged / WEIGHTS, heads, iter(tensors.values()))
        config = copy.deepcopy(config)
        config.inference_mode = True
        config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        for path in staged.iterdir():
            sync(path)
        publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
