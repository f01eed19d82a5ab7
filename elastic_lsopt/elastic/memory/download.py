"""Device memory to host memory: few large copies that the host does not wait for.

    many small tensors  ->  one staging buffer on the device  ->  pinned host memory        a kernel and a copy per run
    a large tensor      ->  pinned host memory                                              a copy

A copy to pageable memory holds up the host until it has ended, and takes its bytes through a buffer of the driver's; a
copy for each of a thousand tensors costs more to ask for than to make. All is asked for on the present stream, so what
changes the tensors next comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RUN_BYTES = 32 * 2**20
"""Of the staging buffer: what one copy takes of small tensors together."""
Span = tuple[int, int]
"""The bytes [begin, end) of the host buffer."""


def runs(spans: Sequence[Span], limit: int) -> list[list[int]]:
    """The places of ascending spans, in order, in runs that reach over at most `limit` bytes, or of one span alone."""
    out: list[list[int]] = []
    for i, (_, end) in enumerate(spans):
        if out and end - spans[out[-1][0]][0] <= limit:
            out[-1].append(i)
        else:
            out.append([i])
    return out


class Download:
    """Copies tensors of one device, over and over. Memory: RUN_BYTES on the device, from the first copy on."""

    def __init__(self, device: torch.device, run_bytes: int = RUN_BYTES) -> None:
        self._device, self._run_bytes = device, run_bytes
        self._staging: Tensor | None = None

    def to(self, buffer: Tensor, spans: Sequence[Span], sources: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Each source, 1-D, into its span of `buffer` (bytes, pinned where the device is a GPU; spans ascend).

        Returns the event after which the bytes are there; None where they are. Bytes between spans are undefined.
        """
        for run in runs(spans, self._run_bytes):
            begin, end = spans[run[0]][0], spans[run[-1]][1]
            if len(run) == 1:
                buffer[begin:end].copy_(sources[run[0]].view(torch.uint8), non_blocking=True)
                continue
            if self._staging is None:
                self._staging = torch.empty(self._run_bytes, dtype=torch.uint8, device=self._device)
            places = [self._staging[spans[i][0] - begin : spans[i][1] - begin].view(sources[i].dtype) for i in run]
            torch._foreach_copy_(places, [sources[i] for i in run])
            buffer[begin:end].copy_(self._staging[: end - begin], non_blocking=True)
        if self._device.type != "cuda":
            return None
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return done
