"""Who writes which chunk, and which saved chunks fill a rank's own: planners of torch.distributed.checkpoint.

All tensors are flat; a chunk is [offset, offset + length) of one. Any layout of chunks can be loaded into any other.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from elastic_lsopt.checkpoint.contents import Held, merge_facts

Chunk = tuple[str, int, int]


def share_out(holdings: Sequence[Iterable[Chunk]]) -> list[set[Chunk]]:
    """For each rank the chunks that it writes: each chunk once, by the holder that has least to write so far.

    `holdings` are the chunks (parameter, offset, length) of each rank. Large chunks are dealt first, so that replicas
    share the work evenly.
    """
    holders: dict[Chunk, list[int]] = {}
    for rank, chunks in enumerate(holdings):
        for chunk in chunks:
            holders.setdefault(chunk, []).append(rank)
    load, out = [0] * len(holdings), [set[Chunk]() for _ in holdings]
    for chunk in sorted(holders, key=lambda c: (-c[2], c)):
        rank = min(holders[chunk], key=lambda r: load[r])
        load[rank] += chunk[2]
        out[rank].add(chunk)
    return out


class ChunkSavePlanner(SavePlanner):
    """Every chunk that a rank was given is written as it is; the ranks' `facts` travel with the plan."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        self._tensors: dict[str, Held] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(key, [offset]),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size([offset]), torch.Size([tensor.numel()])),
                    properties=TensorProperties(dtype=tensor.dtype),
                    size=torch.Size([held.numel]),
                ),
            )
            for key, held in self._tensors.items()
            for offset, tensor in held.chunks
        ]
        return SavePlan(items, planner_data=self._facts)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, TensorStorageMetadata] = {}
        for plan in all_plans:
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                whole = TensorStorageMetadata(data.properties, data.size, [])
                tensors.setdefault(item.index.fqn, whole).chunks.append(data.chunk)
        for key, tensor in tensors.items():
            covered = sum(chunk.sizes[0] for chunk in tensor.chunks)
            if covered != tensor.size[0]:
                raise RuntimeError(f"the ranks hold {covered} of the {tensor.size[0]} elements of {key}")
        facts = merge_facts([plan.planner_data for plan in all_plans])
        return [SavePlan(plan.items) for plan in all_plans], Metadata(tensors, planner_data=facts)  # type: ignore[arg-type]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        held = self._tensors[write_item.index.fqn]
        return next(tensor for offset, tensor in held.chunks if offset == write_item.index.offset[0])


class ChunkLoadPlanner(LoadPlanner):
    """Saved chunks, or parts of them, into this rank's own tensors, in place and cast to their dtype."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._wanted: dict[str, Held] = state_dict
        self._saved = metadata.state_dict_metadata
        self._into = {
            MetadataIndex(key, [offset]): tensor
            for key, held in self._wanted.items()
            for offset, tensor in held.chunks
        }  # fmt: skip

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, held in self._wanted.items():
            own = [ChunkStorageMetadata(torch.Size([at]), torch.Size([t.numel()])) for at, t in held.chunks]
            reads = create_read_items_for_chunk_list(key, self._saved[key], own)  # type: ignore[arg-type]
            found, needed = sum(r.lengths[0] for r in reads), sum(t.numel() for _, t in held.chunks)
            if found != needed:
                raise RuntimeError(f"the checkpoint has {found} of the {needed} elements that this rank needs of {key}")
            items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("everything that is no tensor is in the facts")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self._into[read_item.dest_index].narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was read into its place."""
