"""The numbers of the GPU noise in plain torch: Philox 4x32-10, then Box-Muller. It defines what the kernel must write.

    words of counter c    w0 w1 w2 w3 = philox4x32((c, 0), key)
    four normals          z0, z1 = box_muller(w0, w1);  z2, z3 = box_muller(w2, w3)
    place of an element   e = 4 LANE chunk + LANE lane + j   holds   z_lane of counter c = LANE chunk + j

One counter serves four elements that lie LANE apart, so a kernel reads and writes four contiguous runs and computes no
word that it throws away. An element's number depends on (key, e) alone, so a piece may start and end anywhere.

Reference: J. Salmon, M. Moraes, R. Dror, D. Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LANE = 512
"""Counters of one chunk, which is 4 * LANE elements. It is part of the noise's identity."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox: four words of 32 bits for each counter.

    Words are held in int64 tensors of any one shape, values in [0, 2**32); the low word comes first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def philox_normal(key: int, first: int, count: int) -> Tensor:
    """N(0, 1) numbers of elements [first, first + count) of the stream `key`, as fp32 (count,) on the CPU.

    `key` has 64 bits. About ten times slower than torch.randn: for tests and for reading, not for training.
    """
    chunks = torch.arange(first // (4 * LANE), -(-(first + count) // (4 * LANE)))
    c = chunks[:, None] * LANE + torch.arange(LANE)  # (chunks, LANE)
    zero = torch.zeros_like(c)
    w0, w1, w2, w3 = philox4x32((c & _WORD, c >> 32, zero, zero), (key & _WORD, key >> 32))
    lanes = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=1)  # (chunks, 4, LANE)
    return lanes.flatten()[first % (4 * LANE) :][:count]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, by halves of b: the whole product would overflow int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _WORD


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals of two words: in fp64 from an fp32 uniform, then fp32.

    The uniform is in (0, 1]: half a step is added so that the logarithm never meets zero. |z| reaches 6.76 at most.
    """
    uniform = (a.float() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform.double()))
    angle = b.double() * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()
