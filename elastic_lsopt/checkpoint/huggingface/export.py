"""The trained weights as a folder that others load: Hugging Face's layout; safetensors and a note for a plain module.

Rank 0 writes the headers of the files, and each rank writes the values that it holds at their place in them: nothing is
gathered, and no rank needs more memory than PIECE_BYTES. The folder gets its name by a rename when all is on disk, so
files that a job has mapped are never written over.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elastic_lsopt.backends.agreement import gather_json, one_line, together
from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.checkpoint.contents import persistent_buffers
from elastic_lsopt.checkpoint.folder import staging, sync, write_json
from elastic_lsopt.checkpoint.huggingface.export_folder import publish, refusal
from elastic_lsopt.checkpoint.huggingface.file_layout import Range, layout_to_save
from elastic_lsopt.checkpoint.huggingface.lora import Product, adapter_of, gathered, merged, name_without, products
from elastic_lsopt.checkpoint.safetensors_file import Head, header_bytes
from elastic_lsopt.errors import UserError
from elastic_lsopt.space.layout import plain_name
from elastic_lsopt.space.vector import Vector

SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 4 * 2**20
TIMEOUT = timedelta(hours=1)
NOTE, CARD = "HOW_TO_LOAD.txt", "README.md"


@dataclass(frozen=True)
class Entry:
    """A tensor of the export, and which elements of which parameter or buffer it is."""

    head: Head
    source: Range


@dataclass(frozen=True)
class File:
    """A file of the export: its name, its header and, for each of its entries, where the bytes begin."""

    name: str
    header: bytes
    entries: tuple[tuple[Entry, int], ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(entry.head.bytes for entry, _ in self.entries)


def export_huggingface(
    backend: Backend,
    module: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    weights: Vector | None = None,
    card: str | None = None,
) -> Path:
    """Write the module's weights, frozen parameters and buffers to `folder` (collective); returns the folder.

    A `transformers` model becomes a folder for `from_pretrained`, in the dtype of its config (else of its parameters),
    under the names and in the pieces that transformers itself would save, in files of at most `shard_bytes`;
    `tokenizer` goes beside it, and `card` as README.md. `weights` are written in place of the trained weights (an
    average of them). A plain module becomes model.safetensors and a note. All ranks must see the folder's parent.
    An earlier export of that name is replaced, by its own manifest, and what else lies there stays. Raises UserError
    where the folder holds only something else or cannot be written, Unsupported for adapters of other kinds than LoRA's
    products (those are merged into their layers; each rank then holds the adapters), on all ranks.
    """
    folder = Path(folder).resolve()
    adapter = adapter_of(module)
    backend.drop_gathered()  # FSDP2 hides the shards of a gathered group
    everybody = backend.groups.job.again("export of the job", TIMEOUT)
    group = backend.groups.replica.again("export", TIMEOUT)
    writes = backend.replica == 0 or backend.groups.apart
    first = backend.rank == 0 and writes
    staged = staging(folder)
    try:
        attempt(folder, everybody, (lambda: refuse(folder)) if first else None)
        points = backend.masters if weights is None else weights.tensors
        held = _held(backend, module, points, adapter, group)
        module = module if not hasattr(module, "get_base_model") else module.get_base_model()  # type: ignore[operator]
        files = _files(_entries(backend, module, adapter), shard_bytes)
        try:
            attempt(folder, everybody, (lambda: _begin(staged, files)) if first else None)
            # Of replicas of one job the first is exported.
            attempt(folder, everybody, (lambda: _write(staged, files, held)) if writes else None)
            end = lambda: _end(module, staged, folder, files, tokenizer, card)  # noqa: E731
            attempt(folder, everybody, end if first else None)
        finally:
            if first:
                shutil.rmtree(staged, ignore_errors=True)
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


def refuse(folder: Path) -> None:
    """Raise UserError where no export may go to this folder."""
    if reason := refusal(folder):
        raise UserError(f"the export to {folder} failed: {reason}.")


def attempt(folder: Path, group: dist.ProcessGroup | None, act: Callable[[], None] | None) -> None:
    """`act` on the ranks that have one (collective); where it fails on one, all raise."""

    def told() -> None:
        try:
            if act is not None:
                act()
        except OSError as error:
            raise UserError(f"the export to {folder} failed: {one_line(error)}.") from error

    together(group, told)


# -- what is written, and where ----------------------------------------------------------------------------------------


def _entries(backend: Backend, module: nn.Module, adapter: str | None) -> list[Entry]:
    """Each parameter and lasting buffer as it is saved; a tied one also under its other names, unless the loader ties
    it itself. Of a model with an adapter those of the plain model."""
    config_dtype = getattr(getattr(module, "config", None), "dtype", None)
    tied_by_loader = getattr(module, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if (plain := _saved_name(name, adapter)) is not None:
            names.setdefault(id(p), []).append(plain)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    others: dict[str, list[str]] = {}
    for p in {id(p): p for p in module.parameters() if id(p) in names}.values():
        first, *more = names[id(p)]
        shapes[first], dtypes[first] = backend.full_shape(p), p.dtype
        if isinstance(config_dtype, torch.dtype) and p.dtype.is_floating_point:
            dtypes[first] = config_dtype
        others[first] = [name for name in more if name not in tied_by_loader]
    for name, buffer in _saved_buffers(module, adapter).items():
        shapes[name], dtypes[name] = tuple(buffer.shape), buffer.dtype
    out = []
    for key, place in _saved_as(module, shapes).items():
        out.append(Entry(Head(key, dtypes[place.name], place.shape), place))
        out += [Entry(Head(n, dtypes[place.name], place.shape), place) for n in others.get(place.name, ())]
    return out


def _saved_as(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Range]:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return {name: Range(name, 0, shape) for name, shape in shapes.items()}
    with torch.device("meta"):  # transformers knows a model by its class, and `fully_shard` has given it another one
        twin = _plain_class(module)(copy.deepcopy(config))
    return layout_to_save(twin, shapes)


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """fully_shard has put a class of its own before the user's."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def _files(entries: list[Entry], limit: int) -> list[File]:
    parts = cut(entries, limit)
    out = []
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        header, begins = header_bytes([entry.head for entry in part])
        out.append(File(name, header, tuple(zip(part, begins, strict=True))))
    return out


def _saved_name(name: str, adapter: str | None) -> str | None:
    return plain_name(name) if adapter is None else name_without(plain_name(name), adapter)


def _saved_buffers(module: nn.Module, adapter: str | None) -> dict[str, Tensor]:
    named = ((_saved_name(name, adapter), buffer) for name, buffer in persistent_buffers(module).items())
    return {name: buffer for name, buffer in named if name is not None}


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter of the plain model: elements from `offset`, and the product that is added."""

    name: str
    offset: int
    values: Tensor
    product: Product | None = None


@dataclass(frozen=True)
class Held:
    """What a rank writes; `factors` are the adapters' matrices, whole."""

    parts: list[Part]
    factors: dict[str, Tensor]


def _held(
    backend: Backend, module: nn.Module, points: Sequence[Tensor], adapter: str | None, group: dist.ProcessGroup | None
) -> Held:
    """What this rank writes (collective); of ranks that hold the same elements the lowest writes."""
    layout = backend.layout
    mine = [
        (layout.parameters[piece.parameter].name, piece.offset, point)
        for piece, point in zip(layout.pieces, points, strict=True)
    ]
    for name, p in module.named_parameters():
        if not p.requires_grad:
            mine.append((plain_name(name), *backend.part_of(p)))
    writers: dict[tuple[str, int, int], int] = {}
    for rank, theirs in enumerate(gather_json(group, [(name, at, part.numel()) for name, at, part in mine])):
        for name, at, length in theirs:
            writers.setdefault((name, at, length), rank)
    added = {p.weight: p for p in products(module, adapter)} if adapter is not None else {}
    factors = gathered(backend, [name for p in added.values() for name in (p.a, p.b)], points) if added else {}
    parts = [
        Part(saved, at, part.detach(), added.get(name))
        for name, at, part in mine
        if writers[name, at, part.numel()] == backend.rank and (saved := _saved_name(name, adapter)) is not None
    ]
    if backend.rank == 0:
        buffers = _saved_buffers(module, adapter)
        parts += [Part(name, 0, local(b).detach().reshape(-1)) for name, b in buffers.items()]
    return Held(parts, factors)


# -- writing -----------------------------------------------------------------------------------------------------------


def _begin(staged: Path, files: Sequence[File]) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for file in files:
        with (staged / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.bytes)


def _write(staged: Path, files: Sequence[File], held: Held) -> None:
    """This rank's values into the files, each of which is on disk when this returns."""
    places: dict[str, list[tuple[File, Entry, int]]] = {}
    for file in files:
        for entry, begin in file.entries:
            places.setdefault(entry.source.name, []).append((file, entry, begin))
    open_files: dict[str, int] = {}
    try:
        for part in held.parts:
            for file, entry, begin in places.get(part.name, ()):
                first = entry.source.offset
                low, high = max(part.offset, first), min(part.offset + part.values.numel(), first + entry.source.numel)
                if low < high:
                    if file.name not in open_files:
                        open_files[file.name] = os.open(staged / file.name, os.O_WRONLY)
                    at = begin + (low - first) * entry.head.dtype.itemsize
                    _put(open_files[file.name], at, part, low, high, entry.head.dtype, held.factors)
        for descriptor in open_files.values():
            os.fsync(descriptor)
    finally:
        for descriptor in open_files.values():
            os.close(descriptor)


def _put(
    descriptor: int, at: int, part: Part, low: int, high: int, dtype: torch.dtype, factors: dict[str, Tensor]
) -> None:
    """Elements [low, high) of a parameter to byte `at`, a few megabytes at a time."""
    step = PIECE_BYTES // dtype.itemsize
    for begin in range(low, high, step):
        values = part.values[begin - part.offset : min(begin + step, high) - part.offset]
        if part.product is not None:
            values = merged(values, begin, part.product, factors)
        data = values.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data
        while data:
            written = os.pwrite(descriptor, data, at)
            data, at = data[written:], at + written


def _end(
    module: nn.Module, staged: Path, folder: Path, files: Sequence[File], tokenizer: Any, card: str | None
) -> None:
    names = [file.name for file in files]
    if len(files) > 1:
        where = {entry.head.name: file.name for file in files for entry, _ in file.entries}
        total = sum(entry.head.bytes for file in files for entry, _ in file.entries)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(staged / "model.safetensors.index.json", index)
    _describe(module, staged, names)
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
    if card is not None:
        (staged / CARD).write_text(card, encoding="utf-8")
    for path in _plain_files(staged, names):
        sync(path)
    publish(staged, folder)


def _plain_files(staged: Path, synced: Sequence[str]) -> Iterator[Path]:
    return (path for path in staged.iterdir() if path.name not in synced)


def _describe(module: nn.Module, staged: Path, names: list[str]) -> None:
    """config.json for `from_pretrained`; for a plain module a note."""
    kind = _plain_class(module)
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
