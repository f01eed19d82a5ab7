"""A checkpoint's files without a pickle: safetensors for tensors, JSON for the rest.

`contents.json`:
    {"tensors": {"weights/a": {"dtype": "F32", "numel": 143, "chunks": [[offset, length, file], …]}}, …},
     "files": ["rank-0.safetensors", …], "facts": {…}}
where `file` counts through "files". Inside a file the chunk of `weights/a` at offset 70 is the tensor `weights/a@70`.
(torch.distributed.checkpoint keeps its metadata and its shards as pickles, and its ranks send each other their plans
as pickles: reading those runs whatever they say.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from elastic_lsopt.checkpoint.contents import Held, Snapshot, merge_metadata
from elastic_lsopt.checkpoint.folder import CONTENTS, read_json
from elastic_lsopt.checkpoint.planner import Read, reads
from elastic_lsopt.checkpoint.safetensors_file import DTYPES, FileRecord, Head, write_tensors

Json = dict[str, Any]


def tensor_name(key: str, offset: int) -> str:
    """What a chunk is called inside its file."""
    return f"{key}@{offset}"


def write_share(snapshot: Snapshot, path: Path) -> Json:
    """Write a rank's chunks to one file, on disk when this returns; what the others must know of it, as JSON.

    Raises OSError where the disk is full.
    """
    chunks = [(key, offset, tensor) for key, held in snapshot.tensors.items() for offset, tensor in held.chunks]
    heads = [Head(tensor_name(key, offset), tensor.dtype, (tensor.numel(),)) for key, offset, tensor in chunks]
    record = write_tensors(path, heads, (tensor for _, _, tensor in chunks))
    tensors = {
        key: {
            "dtype": DTYPES[held.chunks[0][1].dtype], "numel": held.numel,
            "chunks": [[offset, tensor.numel()] for offset, tensor in held.chunks],
        }
        for key, held in snapshot.tensors.items()
        if held.chunks
    }  # fmt: skip
    return {"file": asdict(record), "tensors": tensors, "facts": snapshot.metadata}


def contents_of(written: Sequence[Json]) -> tuple[Json, list[FileRecord]]:
    """`contents.json` and the files of a checkpoint, from what each rank says of its share.

    Raises RuntimeError where the ranks do not hold a tensor once and whole, Unsupported where their facts differ.
    """
    tensors: dict[str, Json] = {}
    for number, share in enumerate(written):
        for key, own in share["tensors"].items():
            whole = tensors.setdefault(key, {"dtype": own["dtype"], "numel": own["numel"], "chunks": []})
            whole["chunks"] += [[offset, length, number] for offset, length in own["chunks"]]
    for key, whole in tensors.items():
        covered = sum(length for _, length, _ in whole["chunks"])
        if covered != whole["numel"]:
            raise RuntimeError(f"the ranks hold {covered} of the {whole['numel']} elements of {key}")
    records = [FileRecord(**share["file"]) for share in written]
    metadata = merge_metadata([share["facts"] for share in written])
    return {"tensors": tensors, "files": [record.name for record in records], "facts": metadata}, records


class SafetensorsReader:
    """A checkpoint on disk; reads of each file only what this rank needs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._contents = read_json(path / CONTENTS)

    @property
    def metadata(self) -> Json:
        return self._contents["facts"]

    @property
    def tensors(self) -> dict[str, Json]:
        """Key -> dtype, numel, chunks."""
        return self._contents["tensors"]

    def read(self, wanted: Mapping[str, Held]) -> None:
        """Fill the wanted chunks in place, cast to their dtype; each file is opened once.

        Raises RuntimeError where the checkpoint lacks a part of them, OSError where a file cannot be read.
        """
        todo: list[tuple[str, Read, Tensor]] = []
        for key, held in wanted.items():
            own = [
                (key, read, tensor)
                for at, tensor in held.chunks
                for read in reads(at, tensor.numel(), self.tensors[key]["chunks"])
            ]
            found, needed = sum(read.length for _, read, _ in own), sum(t.numel() for _, t in held.chunks)
            if found != needed:
                raise RuntimeError(f"the checkpoint has {found} of the {needed} elements that this rank needs of {key}")
            todo += own

        def file(item: tuple[str, Read, Tensor]) -> int:
            return item[1].file

        for number, items in groupby(sorted(todo, key=file), key=file):
            with safe_open(self._path / self._contents["files"][number], framework="pt") as tensors:  # type: ignore[no-untyped-call]
                for key, read, target in items:
                    saved = tensors.get_slice(tensor_name(key, read.saved_at))
                    target.narrow(0, read.into, read.length).copy_(saved[read.begin : read.begin + read.length])
