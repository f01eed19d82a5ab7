"""The ranks in two halves that stand at different points of the weights and take a gradient each at the same time.

    rank          0 1 2 3 | 4 5 6 7        half 0 at one point, half 1 at the other; 1 and 5 are twins
    micro-batch u   of a step is run by rank u mod 4 of each half, so by two twins

Each half adds up its own gradient over a group of its own, then twins send theirs to each other: so every rank holds
both, the same bits everywhere. Two ranks need no group and one message. Of P elements on N ranks each sends
2 P (N/2 - 1) / (N/2) + P, where two passes one after the other reduce 2 x 2 P (N - 1) / N. The reductions wait for the
backward pass to end; DistributedDataParallel's own run beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_lsopt.backends.groups import Group
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.upload import on_device


class Halves:
    """This rank's place in them (collective to make). Raises Unsupported for an odd number of ranks."""

    def __init__(self, whole: Group) -> None:
        if whole.size % 2:
            ranks = "one rank" if whole.size == 1 else f"{whole.size} ranks"
            raise Unsupported(
                f"halves=True: {ranks} cannot be parted into two halves; start an even number of ranks, or set "
                "halves=False."
            )
        self._whole, self.size = whole, whole.size // 2
        self.number, place = divmod(whole.rank, self.size)
        self._twin = whole.rank + (self.size if self.number == 0 else -self.size)
        self._own = Group(place, self.size)
        if self.size > 1:
            groups = [dist.new_group([n * self.size + r for r in range(self.size)]) for n in (0, 1)]
            own = groups[self.number]
            assert isinstance(own, dist.ProcessGroup)
            self._own = Group(place, self.size, own)

    def reduced(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        """The gradients in `.grad`, which are let go of, averaged over each half; and which any rank has (collective).

        Both as 1-D tensors in fp32, or fp64 where any parameter is. Memory: two vectors, in place of `.grad`.
        """
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        own = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
        *pieces, has = own.split(sizes)
        has.copy_(on_device([p.grad is not None for p in parameters], own.device))
        for piece, p in zip(pieces, parameters, strict=True):
            piece.zero_() if p.grad is None else piece.copy_(p.grad.reshape(-1))
            p.grad = None
        self._own.sum_(own).div_(self.size)
        other = torch.empty_like(own)
        group = self._whole.handle
        messages = [dist.P2POp(dist.isend, own, self._twin, group), dist.P2POp(dist.irecv, other, self._twin, group)]
        for message in dist.batch_isend_irecv(messages):
            message.wait()
        both = (own, other) if self.number == 0 else (other, own)
        (*first, in_first), (*second, in_second) = (flat.split(sizes) for flat in both)
        return first, second, (in_first + in_second > 0).tolist()
