"""Noise that belongs to the parameter: the same numbers however its elements are cut over ranks.

    key of a parameter    block_seed(seed, name), where `seed` is block_seed(run's seed, step, draw)
    block b on a CPU      elements [65536 b, 65536 (b + 1)): torch.randn, seeded with block_seed(key, b)
    element e on a GPU    Philox numbered by e under the key (`philox.py`; fused kernel in `noise_triton.py`)

A rank that holds any piece of a block makes the whole block and keeps its piece, because torch does not promise
that a shorter torch.randn is a prefix of a longer one. So a piece of a few elements costs a block, about 0.3 ms.

The device kind is part of the noise's identity: CPU and GPU draw different numbers. Among CPUs, torch has one
Box-Muller for AVX2 and one without, which differ in the last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_lsopt.errors import Unsupported

BLOCK = 65_536
"""Elements that share one generator on a CPU. It is part of the noise's identity: another value, other numbers."""

_SERIAL = 32_768
"""Elements up to which torch runs an operation in one thread. A larger piece wakes all threads to share microseconds
of work; where another process holds a core, each such wake-up waits for it: measured 40 times slower in all."""


def block_seed(seed: int, *key: int | str) -> int:
    """64 bits that depend on every part of the key and its place: the seed of a step, a draw, a parameter or a block.

    Equal in every process and Python version: BLAKE2b of the key as ASCII JSON (`hash` is salted). Costs 3 us.
    """
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, *key]).encode(), digest_size=8).digest(), "big")


@torch.no_grad()
def fill_normal_(out: Tensor, *, seed: int, name: str, offset: int) -> Tensor:
    """Write the N(0, 1) numbers of elements [offset, offset + out.numel()) of the flattened parameter `name`.

    `out` is a contiguous 1-D view (length,) of any floating type, and is returned. The numbers are fp32, then cast:
    fp64 gets the same noise as fp32, bf16 its rounding. Scratch on a CPU is one block of fp32, whatever the length;
    on a GPU none. Raises ValueError for a view of another kind, Unsupported for a device that is neither CPU nor CUDA.
    """
    _check(out, offset)
    key = block_seed(seed, name)
    if out.is_cuda:
        from elastic_lsopt.space.random.noise_triton import normal_

        return normal_(out, key=key, first=offset)
    for piece, z, _ in _pieces(out, key, offset):
        piece.copy_(z)
    return out


@torch.no_grad()
def add_normal_(
    out: Tensor, *, seed: int, name: str, offset: int, scale: float | Tensor, row_length: int | None = None
) -> Tensor:
    """Add scale * z to `out`, with the same z that `fill_normal_` writes; return `out`.

    `scale` is a number or a 0-d tensor, or a tensor (rows,) with a `row_length`: element e of the parameter then takes
    scale[e // row_length]. Tensors are of fp32 or fp64 on the device of `out`. Arithmetic is in fp64 for an fp64 `out`,
    else in fp32, and rounded once into `out`. Scratch on a CPU is at most two blocks of fp32, whatever the length; on a
    GPU one kernel reads and writes `out` once.
    Raises what `fill_normal_` raises, and ValueError for a scale of another shape or with too few rows.
    """
    _check(out, offset)
    if not out.numel():
        return out  # of rows of no length, too
    _check_scale(out, offset, scale, row_length)
    key = block_seed(seed, name)
    if out.is_cuda:
        from elastic_lsopt.space.random.noise_triton import normal_

        return normal_(out, key=key, first=offset, scale=scale, row_length=row_length)
    exact = torch.float64 if out.dtype == torch.float64 else torch.float32
    if isinstance(scale, Tensor):
        scale = scale.to(exact)
    for piece, z, first in _pieces(out, key, offset):
        step = z.to(exact)
        if isinstance(scale, Tensor) and row_length is not None:
            _multiply_rows_(step, first, scale, row_length)
        else:
            step.mul_(scale)
        # Two roundings on purpose. `add_(z, alpha=scale)` fuses them with AVX2 and not without, and none promises that
        # a loop's tail does as its body: a sum that depends on the machine, or on where the shards are cut.
        piece.add_(step)
    return out


def _pieces(out: Tensor, key: int, offset: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut `out` at the parameter's blocks, and further for one thread: (piece, its z in fp32, its first element)."""
    generator = torch.Generator()
    end = offset + out.numel()
    run = BLOCK if torch.get_num_threads() == 1 else _SERIAL
    for block in range(offset // BLOCK, -(-end // BLOCK)):
        z = _block_normals(block_seed(key, block), generator)
        origin, stop = block * BLOCK, min(end, (block + 1) * BLOCK)
        for first in range(max(offset, origin), stop, run):
            last = min(first + run, stop)
            yield out[first - offset : last - offset], z[first - origin : last - origin], first


def _block_normals(seed: int, generator: torch.Generator) -> Tensor:
    """The numbers of one block, fp32 (BLOCK,).

    torch's CPU generator keeps 32 bits of its seed: of the 1e5 blocks of a 7e9-parameter model, one pair a draw would
    get the same numbers. Twelve more bits say where in the generator's stream the block begins, which parts the pair.
    """
    generator.manual_seed(seed & 0xFFFFFFFF)
    torch.rand(seed >> 52, generator=generator)
    return torch.randn(BLOCK, generator=generator)


def _multiply_rows_(z: Tensor, first: int, scale: Tensor, row_length: int) -> None:
    """z[i] *= scale[(first + i) // row_length]: the row it starts in, whole rows as a matrix, the row it ends in."""
    row = first // row_length
    scale = scale[row : (first + z.numel() - 1) // row_length + 1]
    head = min(-first % row_length, z.numel())
    rows, tail = divmod(z.numel() - head, row_length)
    if head:
        z[:head].mul_(scale[0])
    z[head : z.numel() - tail].view(rows, row_length).mul_(scale[int(head > 0) :][:rows, None])
    if tail:
        z[z.numel() - tail :].mul_(scale[-1])


def _check(out: Tensor, offset: int) -> None:
    if out.dim() != 1 or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(
            f"noise needs a contiguous 1-D floating-point view, got shape {tuple(out.shape)}, stride {out.stride()}, "
            f"{out.dtype}; pass the shard's flat view."
        )
    if offset < 0:
        raise ValueError(f"offset={offset} must be >= 0: it counts elements from the parameter's start.")
    if out.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"noise on device '{out.device}' is not supported: use one of cpu, cuda.")


def _check_scale(out: Tensor, offset: int, scale: float | Tensor, row_length: int | None) -> None:
    if not isinstance(scale, Tensor):
        if row_length is not None:
            raise ValueError(f"row_length={row_length} needs a 1-D tensor as scale, got {scale!r}; leave one out.")
        return
    single = scale.dim() == 0 and row_length is None
    rows = scale.dim() == 1 and row_length is not None and row_length >= 1
    if scale.device != out.device or not (single or rows):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} on {scale.device} with row_length={row_length}: a tensor scale must "
            f"be 1-D with row_length >= 1, or 0-d without, on {out.device}."
        )
    if row_length is None:
        return
    end = offset + out.numel()
    if scale.numel() * row_length < end:
        raise ValueError(
            f"scale has {scale.numel()} row(s) of {row_length} elements, but the piece ends at element {end}: "
            f"pass at least {-(-end // row_length)} rows, counted from the parameter's start."
        )
