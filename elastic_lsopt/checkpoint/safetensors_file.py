"""Write one safetensors file tensor by tensor, with its checksum: host memory for one tensor, never for the file.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, byte range), and
the bytes of the tensors in that order. The safetensors library reads it; its own writer wants all tensors at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's name of each dtype that a training state or a model can hold."""
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
ALIGNMENT = 64


@dataclass(frozen=True)
class Head:
    """Name, dtype and shape of a tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """A written file: its name in the folder, its size, the blake2b checksum of all its bytes (hexadecimal)."""

    name: str
    bytes: int
    blake2b: str


def header_bytes(heads: Sequence[Head]) -> tuple[bytes, list[int]]:
    """What a file begins with that holds these tensors in their order, and where in the file each of them begins."""
    at, table = 0, dict[str, dict[str, Any]]({"__metadata__": {"format": "pt"}})
    begins = []
    for head in heads:
        table[head.name] = {
            "dtype": DTYPES[head.dtype], "shape": list(head.shape), "data_offsets": [at, at + head.bytes],
        }  # fmt: skip
        begins.append(at)
        at += head.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + begin for begin in begins]


def write_tensors(path: Path, heads: Sequence[Head], tensors: Iterable[Tensor]) -> FileRecord:
    """Write `tensors`, one for each head and in their order, on disk when this returns (fsync).

    Tensors may lie on any device and are taken one at a time, so an iterator that makes them keeps memory low.
    Raises OSError where the disk is full; the file is then incomplete.
    """
    header, _ = header_bytes(heads)
    with path.open("wb") as out:
        digest = hashlib.blake2b(header)
        out.write(header)
        for head, tensor in zip(heads, tensors, strict=True):
            assert tensor.dtype == head.dtype and tensor.numel() == prod(head.shape), head
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(path.name, len(header) + sum(head.bytes for head in heads), digest.hexdigest())
