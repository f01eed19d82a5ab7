"""Whether two folders hold the same model: told by their configs, their headers and a few bytes of each tensor.

A whole digest of 100 GB would take minutes on every node. Two models of one shape differ nearly everywhere, or (an
adapter was merged into one of them) in all of some tensors, so bytes from the middle of every tensor tell them apart;
what differs elsewhere alone, as one edited element, is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

from elastic_lsopt.checkpoint.huggingface.folder_weights import Stored, stored_tensors
from elastic_lsopt.checkpoint.safetensors_file import BY_NAME

CONFIG = "config.json"
SAMPLE_BYTES = 64
MOST_SAMPLES = 4096
"""Tensors that are looked into, spread over a folder that has more (experts)."""


def identity_of_folder(folder: Path) -> dict[str, str]:
    """A digest by file name: of the config whole, of each safetensors file its length, header and samples.

    Raises UserError for a folder that is not whole. Reads at most MOST_SAMPLES times SAMPLE_BYTES beside the headers.
    """
    stored = [*stored_tensors(folder).items()]
    files: dict[str, list[tuple[str, Stored]]] = {}
    for key, tensor in stored:
        files.setdefault(tensor.file, []).append((key, tensor))
    every = -(-len(stored) // MOST_SAMPLES)
    config = folder / CONFIG
    out = {CONFIG: _told(config.stat().st_size, [config.read_bytes()])} if config.is_file() else {}
    for name, own in files.items():
        out[name] = _told((folder / name).stat().st_size, _looks(folder / name, own, every))
    return out


def _looks(path: Path, own: list[tuple[str, Stored]], every: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        for number, (key, tensor) in enumerate(own):
            yield f"{key} {tensor.dtype} {tensor.shape} {tensor.begin}".encode()
            size = prod(tensor.shape) * (BY_NAME[tensor.dtype].itemsize if tensor.dtype in BY_NAME else 1)
            if number % every == 0:
                file.seek(tensor.begin + max(0, size - SAMPLE_BYTES) // 2)
                yield file.read(min(size, SAMPLE_BYTES))


def _told(size: int, parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{size} bytes, digest {digest.hexdigest()}"
