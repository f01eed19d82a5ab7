"""From a device to host memory in few copies: every byte in its place, and the host does not wait."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from elastic_lsopt.elastic.memory.download import Download, runs

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)
ALIGNED = 64


def a_state(seed: int, device: str) -> tuple[list[tuple[int, int]], list[torch.Tensor], int]:
    """Tensors of many sizes and their aligned spans, with gaps."""
    draw, spans, tensors, at = random.Random(seed), [], [], 0
    for _ in range(draw.randrange(1, 30)):
        t = torch.arange(draw.choice([0, 1, 7, 100, 5000])).to(draw.choice(DTYPES)).to(device)
        at += draw.choice([0, ALIGNED])
        spans.append((at, at + t.numel() * t.element_size()))
        tensors.append(t)
        at = -(-spans[-1][1] // ALIGNED) * ALIGNED
    return spans, tensors, at


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(30))
def test_runs_hold_each_span_once_and_no_more_than_the_buffer(seed: int) -> None:
    spans, _, _ = a_state(seed, "cpu")
    found = runs(spans, 4096)
    assert [i for run in found for i in run] == list(range(len(spans)))
    assert all(spans[run[-1]][1] - spans[run[0]][0] <= 4096 for run in found if len(run) > 1)
    for one, other in pairwise(found):  # none is shorter than it need be
        assert spans[other[0]][1] - spans[one[0]][0] > 4096


@pytest.mark.fast
def test_small_tensors_travel_together() -> None:
    spans = [(i * ALIGNED, i * ALIGNED + 8) for i in range(1000)]
    assert len(runs(spans, 32 * 2**20)) == 1


def check(device: str, seed: int) -> None:
    spans, tensors, size = a_state(seed, device)
    expected = [t.clone().cpu() for t in tensors]
    download = Download(torch.device(device), 4096)
    for _ in range(2):  # the staging buffer is used again
        buffer = torch.full((size,), 77, dtype=torch.uint8)
        if device == "cuda":
            buffer = buffer.pin_memory()
            torch.cuda.set_sync_debug_mode("error")
        try:
            done = download.to(buffer, spans, tensors)
            for t in tensors:
                t.zero_()  # asked for after the copy, so not in it
        finally:
            torch.cuda.set_sync_debug_mode("default") if device == "cuda" else None
        if done is not None:
            done.synchronize()
        for (begin, end), t, wanted in zip(spans, tensors, expected, strict=True):
            assert torch.equal(buffer[begin:end].view(t.dtype), wanted)
            t.copy_(wanted)


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(30))
def test_every_byte_is_in_its_place(seed: int) -> None:
    check("cpu", seed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(10))
def test_a_gpu_is_not_waited_for(seed: int) -> None:
    check("cuda", seed)
