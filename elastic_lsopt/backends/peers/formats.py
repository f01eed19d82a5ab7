"""In how many bits numbers travel between replicas, and what rounding leaves behind.

    bits 32   as they are (fp64 too)         bits 16   bfloat16
    bits 8, 4   q = round(x / s), |q| <= 127 or 7, s = max |x| of its block over 127 or 7
    bits 2      q in {-3, -1, 1, 3} / 2 by the sizes |x| <> rms, s = <x, q> / <q, q>

    top-k       of each chunk of numbers the k largest, by place (12 bits) and in one of the above

A block of 256 elements has one scale, in fp32: 8, 4 and 2 bits are 8.125, 4.125 and 2.125 an element. Every format
makes an error no longer than the numbers themselves (of two bits because its scale is the projection of x on q, where
one by the largest element would be far off), which is what error feedback needs to converge: Karimireddy, Rebjock,
Stich, Jaggi: "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, arXiv 1901.09847.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Elements with one scale."""
BITS = (32, 16, 8, 4, 2)
PLACE_BITS = 12
"""Of a place in a chunk, as the authors of SparseLoCo pack it."""


class Format(Protocol):
    """Rows of numbers as rows of bytes. Rows have a multiple of `step` elements."""

    exact: bool
    sparse: ClassVar[bool]
    """Whether a sum has more to tell than what it is of: then all tell all theirs, and each adds up by itself."""
    step: int

    def encode(self, rows: Tensor) -> Tensor:
        """(R, n) numbers as (R, bytes) uint8."""
        ...

    def decode(self, received: Tensor, dtype: torch.dtype) -> Tensor:
        """What `encode` made of them, (R, n)."""
        ...


class AsTheyAre:
    """The bytes of the numbers, or of their bfloat16."""

    sparse: ClassVar[bool] = False
    step = BLOCK

    def __init__(self, narrow: torch.dtype | None = None) -> None:
        self._narrow, self.exact = narrow, narrow is None

    def encode(self, rows: Tensor) -> Tensor:
        return (rows if self._narrow is None else rows.to(self._narrow)).contiguous().view(torch.uint8)

    def decode(self, received: Tensor, dtype: torch.dtype) -> Tensor:
        return received.view(dtype if self._narrow is None else self._narrow).to(dtype)


class Blocks:
    """Whole numbers of 8, 4 or 2 bits, and a scale per block before them."""

    exact, step = False, BLOCK
    sparse: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        self.bits, self.most = bits, {8: 127, 4: 7, 2: 3}[bits]

    def encode(self, rows: Tensor) -> Tensor:
        blocks = rows.float().view(rows.shape[0], -1, BLOCK)
        codes, scales = self._two_bits(blocks) if self.bits == 2 else self._whole(blocks)
        packed = self._packed(codes.view(rows.shape[0], -1))
        return torch.cat([scales.contiguous().view(torch.uint8).view(rows.shape[0], -1), packed], dim=1)

    def decode(self, received: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = received.shape[1] // (4 + BLOCK * self.bits // 8)
        scales = received[:, : 4 * blocks].contiguous().view(torch.float32)
        codes = self._unpacked(received[:, 4 * blocks :]).view(received.shape[0], blocks, BLOCK)
        return (codes * scales[:, :, None]).view(received.shape[0], -1).to(dtype)

    def _whole(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scales = blocks.abs().amax(2) / self.most
        codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]).round_()
        return codes.clamp_(-self.most, self.most).add_(self.most).to(torch.uint8), scales

    def _two_bits(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        large = blocks.abs() > blocks.square().mean(2, keepdim=True).sqrt()
        halves = torch.where(large, 3.0, 1.0) * torch.where(blocks < 0, -1.0, 1.0)  # twice q
        scales = (blocks * halves).sum(2) / halves.square().sum(2)
        return halves.add_(3).div_(2).to(torch.uint8), scales

    def _packed(self, codes: Tensor) -> Tensor:
        """Several codes a byte, the first of them lowest."""
        per_byte = 8 // self.bits
        parts = codes.view(codes.shape[0], -1, per_byte)
        out = parts[:, :, 0].clone()
        for i in range(1, per_byte):
            out |= parts[:, :, i] << (self.bits * i)
        return out

    def _unpacked(self, packed: Tensor) -> Tensor:
        mask, per_byte = 2**self.bits - 1, 8 // self.bits
        codes = torch.stack([(packed >> (self.bits * i)) & mask for i in range(per_byte)], dim=2)
        codes = codes.view(packed.shape[0], -1).float()
        return codes.mul_(2).sub_(3) if self.bits == 2 else codes.sub_(self.most)


class TopK:
    """The k largest of each chunk."""

    exact = False
    sparse: ClassVar[bool] = True

    def __init__(self, k: int, chunk: int, values: Format) -> None:
        assert chunk <= 2**PLACE_BITS
        self.k, self.step, self._values = k, chunk, values

    def encode(self, rows: Tensor) -> Tensor:
        chunks = rows.view(-1, self.step)
        places = chunks.abs().topk(self.k, dim=1, sorted=False).indices
        kept = chunks.gather(1, places).view(rows.shape[0], -1)
        values = self._values.encode(pad(kept, (0, -kept.shape[1] % self._values.step)))
        count = torch.tensor([[chunks.shape[0] // rows.shape[0]]]).expand(rows.shape[0], 1).contiguous()
        return torch.cat([count.view(torch.uint8), _narrow(places.view(rows.shape[0], -1)), values], dim=1)

    def decode(self, received: Tensor, dtype: torch.dtype) -> Tensor:
        count = int(received[0, :8].contiguous().view(torch.int64))
        end = 8 + 3 * ((count * self.k + 1) // 2)
        places = _wide(received[:, 8:end])[:, : count * self.k].reshape(-1, self.k)
        told = received[:, end:].clone(memory_format=torch.contiguous_format)  # from byte 0 on, as its numbers need it
        values = self._values.decode(told, dtype)[:, : count * self.k]
        out = torch.zeros(len(received) * count, self.step, dtype=dtype)
        return out.scatter_(1, places, values.reshape(-1, self.k)).view(len(received), -1)


def _narrow(places: Tensor) -> Tensor:
    """Two places in three bytes."""
    first, second = pad(places, (0, places.shape[1] % 2)).view(places.shape[0], -1, 2).unbind(2)
    parts = (first & 255, first >> 8 | (second & 15) << 4, second >> 4)
    return torch.stack(parts, dim=2).to(torch.uint8).view(places.shape[0], -1)


def _wide(narrow: Tensor) -> Tensor:
    """What `_narrow` has put together."""
    low, middle, high = narrow.reshape(narrow.shape[0], -1, 3).long().unbind(2)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=2).view(narrow.shape[0], -1)


def format_of(bits: int, top_k: int | None = None, chunk: int = 4096) -> Format:
    """The format of a number of bits, one of BITS; with `top_k` of the so many largest of each chunk."""
    if top_k is not None:
        return TopK(top_k, chunk, format_of(bits))
    return AsTheyAre() if bits == 32 else AsTheyAre(torch.bfloat16) if bits == 16 else Blocks(bits)
