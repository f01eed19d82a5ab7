"""The trained weights as a folder that others load: Hugging Face's layout; safetensors and a note for a plain module.

Rank 0 writes; the other ranks send it their pieces parameter by parameter, so no rank holds more of the model than one
parameter beside its own shard. The folder gets its name by a rename when all is on disk.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elastic_lsopt.backends.agreement import gather_json, one_line
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.checkpoint.contents import persistent_buffers
from elastic_lsopt.checkpoint.export_folder import publish, refusal
from elastic_lsopt.checkpoint.folder import staging, sync, write_json
from elastic_lsopt.checkpoint.lora import Product, adapter_of, gathered, merged, plain_name, products
from elastic_lsopt.checkpoint.safetensors_file import Head, write_tensors
from elastic_lsopt.errors import UserError
from elastic_lsopt.space.vector import Vector

SHARD_BYTES = 5_000_000_000
TIMEOUT = timedelta(hours=1)
NOTE = "HOW_TO_LOAD.txt"


@dataclass(frozen=True)
class Entry:
    """A tensor of the export; `source` is the parameter or buffer it is read from, its own or the one it is tied to."""

    head: Head
    source: str


def export_huggingface(
    backend: Backend,
    module: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    weights: Vector | None = None,
) -> Path:
    """Write the module's weights, frozen parameters and buffers to `folder` (collective); returns the folder.

    A `transformers` model becomes a folder for `from_pretrained`, in the dtype of its config (else of its parameters),
    in files of at most `shard_bytes`; `tokenizer` goes beside it. `weights` are written in place of the trained weights
    (an average of them). A plain module becomes model.safetensors and a note.
    An earlier export of that name is replaced, by its own manifest, and what else lies there stays. Raises UserError
    where the folder holds only something else or cannot be written, Unsupported for adapters of other kinds than LoRA's
    products (those are merged into their layers), on all ranks.
    """
    folder = Path(folder).resolve()
    adapter = adapter_of(module)
    layers = products(module, adapter) if adapter is not None else []
    backend.drop_gathered()  # FSDP2 hides the shards of a gathered group
    everybody = backend.groups.job.again("export of the job", TIMEOUT)
    group = backend.groups.replica.again("export", TIMEOUT)
    writes = backend.rank == 0 and backend.replica == 0  # of replicas that have drifted apart the first is exported
    try:
        agree(folder, refusal(folder) if writes else None, everybody)
        entries = _entries(backend, module, adapter)
        points = backend.masters if weights is None else weights.tensors
        stream = _stream(backend, module, entries, points, group)
        if layers:
            stream = _with_products(backend, layers, entries, points, stream)
            module = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
        failure: str | None = None
        if writes:
            try:
                _write(module, folder, entries, stream, tokenizer=tokenizer, limit=shard_bytes)
            except OSError as error:
                failure = one_line(error)
        for _ in stream:  # the other ranks send; rank 0, after a failure, still takes what they send
            pass
        agree(folder, failure, everybody)
    finally:
        backend.groups.replica.end(group)
        backend.groups.job.end(everybody)
    return folder


def cut(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive files of at most `limit` bytes; a larger tensor gets one of its own."""
    out: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not out or entry.head.bytes > room:
            out.append([])
            room = limit
        out[-1].append(entry)
        room -= entry.head.bytes
    return out


def agree(folder: Path, failure: str | None, group: dist.ProcessGroup | None) -> None:
    """All ranks raise what rank 0 met."""
    said = gather_json(group, failure)[0]
    if said is not None:
        raise UserError(f"the export to {folder} failed: {said}.")


# -- what is written ---------------------------------------------------------------------------------------------------


def _entries(backend: Backend, module: nn.Module, adapter: str | None) -> list[Entry]:
    """Each parameter and lasting buffer; a tied one also under its other names, unless the loader ties it itself.

    Of a model with an adapter those of the plain model.
    """
    config_dtype = getattr(getattr(module, "config", None), "dtype", None)
    tied_by_loader = getattr(module, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    out = []
    for p in {id(p): p for p in module.parameters()}.values():
        first, *others = names[id(p)]
        shape, dtype = backend.full_shape(p), p.dtype
        if isinstance(config_dtype, torch.dtype) and dtype.is_floating_point:
            dtype = config_dtype
        out += [Entry(Head(n, dtype, shape), first) for n in [first, *(o for o in others if o not in tied_by_loader)]]
    for name, buffer in persistent_buffers(module).items():
        out.append(Entry(Head(name, buffer.dtype, tuple(buffer.shape)), name))
    if adapter is None:
        return out
    named = [(plain_name(entry.head.name, adapter), entry) for entry in out]
    return [replace(entry, head=replace(entry.head, name=name)) for name, entry in named if name is not None]


def _with_products(
    backend: Backend, layers: list[Product], entries: list[Entry], points: Sequence[Tensor], stream: Iterator[Tensor],
) -> Iterator[Tensor]:  # fmt: skip
    """The stream with each adapted layer's product in its weight, on rank 0 (collective)."""
    added = {product.weight: product for product in layers}
    factors = gathered(backend, [name for p in layers for name in (p.a, p.b)], points)
    for entry, whole in zip(entries, stream, strict=True):
        adds = backend.rank == 0 and entry.source in added
        yield merged(whole, added[entry.source], factors) if adds else whole


def _write(
    module: nn.Module, folder: Path, entries: list[Entry], stream: Iterator[Tensor], *, tokenizer: Any, limit: int
) -> None:
    staged = staging(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        files = cut(entries, limit)
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        names = names if len(files) > 1 else ["model.safetensors"]
        for name, part in zip(names, files, strict=True):
            write_tensors(staged / name, [e.head for e in part], islice(stream, len(part)))
        if len(files) > 1:
            where = {e.head.name: name for name, part in zip(names, files, strict=True) for e in part}
            total = sum(e.head.bytes for e in entries)
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(staged / "model.safetensors.index.json", index)
        _describe(module, staged, names)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        for path in staged.iterdir():
            sync(path)
        publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _describe(module: nn.Module, staged: Path, names: list[str]) -> None:
    """config.json for `from_pretrained`; for a plain module a note."""
    # fully_shard has put a class of its own before the user's
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        (staged / NOTE).write_text(
            f"Weights of {kind.__module__}.{kind.__qualname__}, named as in its state_dict:\n\n"
            "    from safetensors.torch import load_file\n"
            f"    model.load_state_dict({{k: v for f in {names} for k, v in load_file(f).items()}})\n"
        )
        return
    config = copy.deepcopy(config)
    config.architectures = [kind.__name__]
    if getattr(config, "dtype", None) is None:
        config.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    config.save_pretrained(staged)
    generation: Any = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(staged)


# -- from the ranks to rank 0 ------------------------------------------------------------------------------------------


def _stream(
    backend: Backend,
    module: nn.Module,
    entries: list[Entry],
    points: Sequence[Tensor],
    group: dist.ProcessGroup | None,
) -> Iterator[Tensor]:
    """The entries' tensors, whole, one at a time, on rank 0's host; on the other ranks nothing of use."""
    layout = backend.layout
    pieces = [(layout.parameters[p.parameter].name, p.offset, p.length) for p in layout.pieces]
    mine = dict(zip(pieces, points, strict=True))
    everyones = gather_json(group, pieces)
    sender: dict[str, dict[tuple[int, int], int]] = {p.name: {} for p in layout.parameters}
    for rank, held in enumerate(everyones):  # the lowest holder sends: rank 0 has no need to ask for what it holds
        for name, offset, length in held:
            sender[name].setdefault((offset, length), rank)
    parameters, buffers = dict(module.named_parameters()), persistent_buffers(module)
    source, whole = "", torch.empty(0)
    for entry in entries:
        head = entry.head
        if entry.source != source:
            source = entry.source
            if source in sender:
                whole = torch.empty(head.shape if backend.rank == 0 else (), dtype=head.dtype)
                for (offset, length), rank in sender[source].items():
                    own = mine.get((source, offset, length))
                    if backend.rank == 0:
                        part = whole.view(-1)[offset : offset + length]
                        part.copy_(own) if own is not None and rank == 0 else dist.recv(part, rank, group)
                    elif backend.rank == rank and own is not None:
                        dist.send(own.detach().to("cpu", head.dtype).contiguous(), 0, group)
            elif source in buffers:
                whole = buffers[source]
            else:
                whole = backend.full_parameter(parameters[source]).detach().to("cpu", head.dtype)
        yield whole
