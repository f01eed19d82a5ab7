"""The noise on a GPU: draw, scale and add in one pass over the weights. `philox.py` says in plain torch what it writes.

Imported only when a CUDA tensor comes: triton is installed with torch's CUDA builds, not with its CPU builds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_lsopt.space.random.philox import LANE

_UNIT = tl.constexpr(2.0**-32)
_ANGLE = tl.constexpr(2.0 * math.pi * 2.0**-32)
_MAX_ROW = 2**32 - 4 * LANE


def normal_(
    out: Tensor, *, key: int, first: int, scale: float | Tensor | None = None, row_length: int | None = None
) -> Tensor:
    """Write z, or with a `scale` add scale * z, for elements [first, first + out.numel()) of the stream `key`.

    `out` is a contiguous 1-D view, and is returned; `key` has 64 bits; `scale` is a number or a 0-d tensor, or a tensor
    (rows,) with a `row_length`, on the same device. Arithmetic is in fp64 for an fp64 `out`, else in fp32, rounded once
    into `out`. One pass over `out`, which it reads and writes once; no scratch, no synchronisation.
    Raises ValueError for rows of more than 4e9 elements.
    """
    if row_length is not None and row_length > _MAX_ROW:
        raise ValueError(
            f"row_length={row_length} must be at most {_MAX_ROW}: places in a row have 32 bits; use shorter rows."
        )
    if out.numel() == 0:
        return out
    if isinstance(scale, int | float):
        scale = torch.full((1,), scale, dtype=torch.float64, device=out.device)
    chunks = triton.cdiv(first + out.numel(), 4 * LANE) - first // (4 * LANE)
    with torch.cuda.device_of(out):
        _normal[(chunks,)](  # pyright: ignore[reportIndexIssue]
            *(out, scale, key, first, out.numel(), row_length or 1),
            PER_ROW=row_length is not None,
            LANE=LANE,
            # Fusion would be the compiler's choice, which differs by version; where it pays, `tl.fma` asks for it.
            enable_fp_fusion=False,
        )
    return out


@triton.jit(do_not_specialize=["key"])
def _normal(
    out,
    scale,
    key: tl.uint64,
    first: tl.int64,
    count: tl.int64,
    row_length: tl.int64,
    PER_ROW: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per chunk of 4 LANE elements; those at the ends of the piece mask what lies outside."""
    chunk = first // (4 * LANE) + tl.program_id(0)
    c = chunk * LANE + tl.arange(0, LANE)
    zero = tl.zeros_like(c).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c.to(tl.uint32), (c >> 32).to(tl.uint32), zero, zero)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    start = chunk * 4 * LANE
    row = start // row_length
    _update(out, z0, 0 * LANE, start, row, scale, first, count, row_length, PER_ROW)
    _update(out, z1, 1 * LANE, start, row, scale, first, count, row_length, PER_ROW)
    _update(out, z2, 2 * LANE, start, row, scale, first, count, row_length, PER_ROW)
    _update(out, z3, 3 * LANE, start, row, scale, first, count, row_length, PER_ROW)


@triton.jit
def _box_muller(a, b):
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float32) + 0.5) * _UNIT))
    cosine, sine = _cos_sin(b)
    return radius * cosine, radius * sine


@triton.jit
def _cos_sin(b):
    """Cosine and sine of b / 2**32 turns, by the Taylor series on an eighth of a turn either side of a quarter turn.

    The word knows its quarter, so the range reduction inside `tl.cos` and `tl.sin` is saved, which was half of the
    kernel's instructions.
    """
    quarter = (b + 0x20000000) >> 30  # the nearest, 0 to 3; the sum wraps
    x = (b - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE  # (-pi/4, pi/4)
    y = x * x
    s = x * tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, 1 / 362880, -1 / 5040), 1 / 120), -1 / 6), 1.0)
    c = tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, 1 / 40320, -1 / 720), 1 / 24), -1 / 2), 1.0)
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def _update(out, z, shift, start, row, scale, first, count, row_length, PER_ROW: tl.constexpr):
    """Write one lane: elements start + shift + j of the parameter, where the piece holds them."""
    j = shift + tl.arange(0, z.shape[0])
    here = start - first + j
    inside = (here >= 0) & (here < count)
    if scale is not None:
        exact: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
        if PER_ROW:
            # The chunk's row took one 64-bit division; an element takes one of 32 bits, which is far cheaper.
            within = (start - row * row_length).to(tl.uint32) + j.to(tl.uint32)
            rows = row + (within // row_length.to(tl.uint32)).to(tl.int64)
            factor = tl.load(scale + rows, mask=inside).to(exact)
        else:
            factor = tl.load(scale).to(exact)
        z = tl.load(out + here, mask=inside).to(exact) + factor * z.to(exact)
    tl.store(out + here, z.to(out.dtype.element_ty), mask=inside)
