"""Storage for torch.distributed.checkpoint without a pickle: safetensors for tensors, JSON for the rest.

`contents.json`:
    {"tensors": {"weights/a": {"dtype": "F32", "numel": 143, "chunks": [[offset, length, file], …]}}, …},
     "files": ["rank-0.safetensors", …], "facts": {…}}
where `file` counts through "files". Inside a file the chunk of `weights/a` at offset 70 is the tensor `weights/a@70`.
(torch's own writer keeps its metadata as a pickle and each shard as another: reading those runs whatever they say.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from elastic_lsopt.checkpoint.folder import CONTENTS, commit, read_json, staging, write_json
from elastic_lsopt.checkpoint.safetensors_file import BY_NAME, DTYPES, FileRecord, Head, write_tensors


def tensor_name(index: MetadataIndex) -> str:
    """What a chunk is called inside its file."""
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


class SafetensorsWriter(StorageWriter):
    """Every rank writes one file into the staged folder; rank 0 adds contents and manifest and renames it to `path`.

    `refuse_outdated()` is called by rank 0 just before, and raises where the checkpoint must not get its name.
    """

    def __init__(self, path: Path, refuse_outdated: Callable[[], None] = lambda: None, writer: int = 0) -> None:
        self._path, self._refuse_outdated, self._writer = path, refuse_outdated, writer
        self._staged = staging(path, writer)
        self._rank = 0
        self.bytes = 0
        """What this rank has written."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0)
        if is_coordinator:  # the others wait for the plan before they write
            shutil.rmtree(self._staged, ignore_errors=True)
            self._staged.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        record = write_tensors(
            self._staged / f"rank-{self._rank}.safetensors",
            [_head(item) for item in plan.items],
            (planner.resolve_data(item) for item in plan.items),  # type: ignore[misc]
        )
        self.bytes = record.bytes
        done.set_result([WriteResult(item.index, _head(item).bytes, record) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for written in results for result in written}
        records: list[FileRecord] = list({record.name: record for record in where.values()}.values())
        number = {record.name: i for i, record in enumerate(records)}
        tensors = {
            key: {
                "dtype": DTYPES[saved.properties.dtype], "numel": saved.size[0],
                "chunks": [
                    [c.offsets[0], c.sizes[0], number[where[MetadataIndex(key, c.offsets)].name]] for c in saved.chunks
                ],
            }
            for key, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }  # fmt: skip
        contents = {"tensors": tensors, "files": [r.name for r in records], "facts": metadata.planner_data}
        self._refuse_outdated()
        commit(self._path, [*records, write_json(self._staged / CONTENTS, contents)], self._writer)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class SafetensorsReader(StorageReader):
    """Reads of each file only what this rank needs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._contents = read_json(path / CONTENTS)

    @property
    def facts(self) -> dict[str, Any]:
        return self._contents["facts"]

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Key -> dtype, numel, chunks."""
        return self._contents["tensors"]

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(dtype=BY_NAME[saved["dtype"]]),
                torch.Size([saved["numel"]]),
                [ChunkStorageMetadata(torch.Size([at]), torch.Size([length])) for at, length, _ in saved["chunks"]],
            )
            for key, saved in self.tensors.items()
        }
        files = self._contents["files"]
        where = {
            MetadataIndex(key, [at]): files[file]
            for key, saved in self.tensors.items()
            for at, _, file in saved["chunks"]
        }  # fmt: skip
        return Metadata(tensors, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._where: dict[MetadataIndex, str] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def file(item: ReadItem) -> str:
            return self._where[item.storage_index]

        for name, items in groupby(sorted(plan.items, key=file), key=file):
            with safe_open(self._path / name, framework="pt") as tensors:  # type: ignore[no-untyped-call]
                for item in items:
                    begin = item.storage_offsets[0]
                    part = tensors.get_slice(tensor_name(item.storage_index))[begin : begin + item.lengths[0]]
                    target = planner.resolve_tensor(item)
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _head(item: WriteItem) -> Head:
    assert item.tensor_data is not None
    return Head(tensor_name(item.index), item.tensor_data.properties.dtype, (item.tensor_data.chunk.sizes[0],))
