"""Noise belongs to the parameter: the laws that hold at any cut, for any seed, on both device kinds.

Run as a program with TRITON_INTERPRET=1 it compares the GPU kernel with its slow form on CPU tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.random.noise import BLOCK, _block_normals, add_normal_, block_seed, fill_normal_
from elastic_lsopt.space.random.philox import philox4x32, philox_normal

SIZE = 3 * BLOCK + 1234
STREAM = {"seed": 11, "name": "layers.0.weight"}
cuts = st.lists(st.integers(0, SIZE), max_size=4)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(count: int, *, offset: int = 0, dtype: torch.dtype = torch.float32, **stream) -> Tensor:
    return fill_normal_(torch.empty(count, dtype=dtype), offset=offset, **{**STREAM, **stream})


def pieces(ends: list[int], size: int = SIZE) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *sorted(ends), size]))


def cpu_by_the_book(seed: int, name: str, blocks: int) -> Tensor:
    """The definition in a plain loop: hash the key, seed torch with its low 32 bits, skip by its high 12 bits."""

    def digest(text: str) -> int:
        return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)

    key, rows = digest(f'[{seed}, "{name}"]'), []
    for b in range(blocks):
        s = digest(f"[{key}, {b}]")
        torch.manual_seed(s % 2**32)
        torch.rand(s // 2**52)
        rows.append(torch.randn(65_536))
    return torch.cat(rows)


# The key


@pytest.mark.fast
def test_seed_is_the_same_in_every_process() -> None:
    # printf '[1, "layer.0.weight", -3]' | b2sum -l 64
    assert block_seed(1, "layer.0.weight", -3) == 0x451A9E55AD7F8225


@pytest.mark.fast
def test_seed_depends_on_each_part_and_its_place() -> None:
    keys = [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), ("1, 2",), (1, 2, 0), (), ("é",), ("\\u00e9",)]
    assert len({block_seed(0, *key) for key in keys}) == len(keys)


# The numbers on a CPU


@pytest.mark.fast
def test_numbers_are_torch_randn_of_each_block() -> None:
    expected = cpu_by_the_book(11, "layers.0.weight", 4)
    for dtype in FLOATS:
        assert torch.equal(normal(SIZE, dtype=dtype), expected[:SIZE].to(dtype)), dtype


@settings(max_examples=25)
@given(cuts)
def test_same_numbers_at_any_sharding(ends: list[int]) -> None:
    whole = normal(SIZE)
    for first, last in pieces(ends):
        assert torch.equal(normal(last - first, offset=first), whole[first:last])


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=10)
@given(cuts)
def test_same_sum_at_any_sharding(dtype: torch.dtype, ends: list[int]) -> None:
    """Bit for bit, in every type: a vector loop and its tail must round alike."""
    start = torch.linspace(-3, 3, SIZE).to(dtype)
    scale = torch.linspace(0.1, 0.7, SIZE // 1000 + 1)
    for by_row in ({"scale": 0.37}, {"scale": scale, "row_length": 1000}):
        whole = add_normal_(start.clone(), offset=0, **STREAM, **by_row)
        for first, last in pieces(ends):
            piece = add_normal_(start[first:last].clone(), offset=first, **STREAM, **by_row)
            assert torch.equal(piece, whole[first:last])


@pytest.mark.fast
def test_same_numbers_at_any_thread_count() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = normal(SIZE)
        torch.set_num_threads(2)
        assert torch.equal(normal(SIZE), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.fast
def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(8)
    torch.manual_seed(5)
    normal(100)
    assert torch.equal(torch.randn(8), expected)


@pytest.mark.fast
def test_streams_are_uncorrelated() -> None:
    n = 4 * BLOCK
    steps_and_draws = [normal(n, seed=block_seed(0, step, draw)) for step in range(3) for draw in range(3)]
    streams = torch.stack(
        [*steps_and_draws, normal(n), normal(n, seed=12), normal(n, name="layers.1.weight"), normal(n, offset=BLOCK)]
    )
    correlation = torch.corrcoef(streams.double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / n**0.5


@pytest.mark.fast
def test_blocks_of_one_torch_seed_are_parted() -> None:
    """torch's CPU generator drops the upper half of its seed: the place in its stream must bring it back."""
    generator = torch.Generator()
    z = torch.stack([_block_normals(99 + (skip << 52), generator) for skip in (0, 1, 8, 16, 4095)])
    assert (torch.corrcoef(z.double()) - torch.eye(5)).abs().max() < 5 / BLOCK**0.5


# Their law


def looks_normal(z: Tensor) -> None:
    """Four moments within five standard errors, and Kolmogorov-Smirnov against the closed form."""
    z, n = z.double(), z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - moment) < 5 * (variance / n) ** 0.5, power
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


@pytest.mark.fast
def test_cpu_numbers_are_standard_normal() -> None:
    looks_normal(normal(1_000_000))


@pytest.mark.fast
def test_gpu_numbers_are_standard_normal() -> None:
    z = philox_normal(block_seed(3, "w"), 777, 1_000_000)
    looks_normal(z)
    lagged = [torch.corrcoef(torch.stack([z[lag:], z[:-lag]]).double())[0, 1].abs() for lag in (1, 512, 1024, 2048)]
    assert max(lagged) < 5 / 1_000_000**0.5


# The addition


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("row_length", "offset"), [(1, 0), (7, 3), (1000, BLOCK - 500), (100_000, 99_999), (10**9, 5)])
def test_add_by_row_is_the_plain_sum(dtype: torch.dtype, row_length: int, offset: int) -> None:
    n = BLOCK + 4321
    rows = (offset + n - 1) // row_length + 1
    scale = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    start = torch.linspace(-1, 1, n).to(dtype)
    z = normal(n, offset=offset, dtype=torch.float64)
    expected = start.double() + z * scale[torch.arange(offset, offset + n) // row_length]
    out = add_normal_(start.clone(), offset=offset, scale=scale, row_length=row_length, **STREAM)
    tolerance = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.fast
def test_add_of_one_scale_is_the_plain_sum() -> None:
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    out = add_normal_(start.clone(), offset=10, scale=-0.3, **STREAM)
    expected = start - 0.3 * normal(SIZE, offset=10, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.fast
def test_empty_shard_and_leaf_parameter() -> None:
    assert normal(0, offset=BLOCK).numel() == 0
    assert add_normal_(torch.empty(0), offset=7, scale=torch.ones(7), row_length=1, **STREAM).numel() == 0
    weight = torch.nn.Parameter(torch.zeros(10))
    add_normal_(weight, offset=0, scale=1.0, **STREAM)
    assert torch.equal(weight.detach(), normal(10))


@pytest.mark.fast
def test_refusals_name_the_thing_and_the_fix() -> None:
    add = {"offset": 0, **STREAM}
    with pytest.raises(ValueError, match=r"contiguous 1-D .* got shape \(2, 3\)"):
        fill_normal_(torch.empty(2, 3), **add)
    with pytest.raises(ValueError, match=r"stride \(2,\)"):
        fill_normal_(torch.empty(6)[::2], **add)
    with pytest.raises(ValueError, match="int64"):
        fill_normal_(torch.empty(6, dtype=torch.int64), **add)
    with pytest.raises(ValueError, match="offset=-1 must be >= 0"):
        normal(4, offset=-1)
    with pytest.raises(Unsupported, match="'meta' is not supported: use one of cpu, cuda"):
        fill_normal_(torch.empty(4, device="meta"), **add)
    with pytest.raises(ValueError, match="row_length=2 needs a 1-D tensor"):
        add_normal_(torch.empty(4), scale=1.0, row_length=2, **add)
    with pytest.raises(ValueError, match="row_length=None: a tensor scale must be 1-D with"):
        add_normal_(torch.empty(4), scale=torch.ones(2), **add)
    with pytest.raises(ValueError, match=r"2 row\(s\) of 2 elements, but the piece ends at element 5: pass at least 3"):
        add_normal_(torch.empty(4), scale=torch.ones(2), row_length=2, offset=1, **STREAM)


# The numbers on a GPU


@pytest.mark.fast
def test_philox_known_answers() -> None:
    """Random123's published vectors for Philox 4x32-10: (counter, key, words)."""
    vectors = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, words in vectors:
        c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
        k0, k1 = (int(word, 16) for word in key.split())
        drawn = " ".join(f"{word.item():08x}" for word in philox4x32((c0, c1, c2, c3), (k0, k1)))
        assert drawn == words


@settings(max_examples=15)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 9000), st.integers(0, 9000))
def test_philox_same_numbers_at_any_sharding(key: int, first: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = philox_normal(key, first, count)
    assert torch.equal(philox_normal(key, first, cut), whole[:cut])
    assert torch.equal(philox_normal(key, first + cut, count - cut), whole[cut:])


def compare_kernel_with_slow_form(device: str) -> None:
    """Fill, one scale and a scale a row, in every dtype, at keys, offsets and cuts that reach both counter words."""
    from elastic_lsopt.space.random.noise_triton import normal_

    places = [(7, 0, 2500), (2**64 - 5, 12_345, 2300), (2**63, 2**36 + 2047, 4097), (block_seed(1, "w"), 2048, 1)]
    # The interpreter cuts bf16 and fp16 off where a GPU rounds, so a whole last place is allowed, not half.
    tolerances = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for (key, first, count), (dtype, tolerance) in itertools.product(places, tolerances.items()):
        if device == "cpu" and dtype != torch.float32 and first:
            continue  # the interpreter takes a tenth of a second for each call
        z = normal_(torch.empty(count, dtype=torch.float64, device=device), key=key, first=first).cpu()
        torch.testing.assert_close(z, philox_normal(key, first, count).double(), rtol=1e-6, atol=1e-6)
        start = torch.linspace(-2, 2, count).to(dtype)
        place = torch.arange(first, first + count)
        scaled = [({}, z), ({"scale": 0.25}, start.double() + 0.25 * z)]
        for row_length, exact in ((49, torch.float64), (1, torch.float32), (2**32 - 2048, torch.float32)):
            if first < 2**32:  # a row scale for each row before 2**36 would not fit
                scale = torch.linspace(0.5, 2, (first + count - 1) // row_length + 1, dtype=exact)
                expected = start.double() + z * scale.double()[place // row_length]
                scaled.append(({"scale": scale.to(device), "row_length": row_length}, expected))
        for arguments, expected in scaled:
            out = normal_(start.clone().to(device), key=key, first=first, **arguments).cpu()
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
            parts = [
                normal_(start[a:b].clone().to(device), key=key, first=first + a, **arguments).cpu()
                for a, b in pieces([count // 3, count // 2 + 1], count)
            ]
            assert torch.equal(torch.cat(parts), out), "the kernel's numbers depend on the cut"
            print(f"kernel == slow form: {dtype}, first {first}, count {count}, {sorted(arguments)}")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the kernel is not checked"
)
def test_triton_kernel_in_the_interpreter() -> None:
    """In a process of its own, because triton reads TRITON_INTERPRET when it is first imported."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kernel == slow form") == 4 * 5 + 2 * 5 + 2, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the compiled kernel is not checked")
def test_triton_kernel_on_cuda() -> None:
    compare_kernel_with_slow_form("cuda")
    z = fill_normal_(torch.empty(5000, device="cuda"), seed=1, name="w", offset=99)
    expected = philox_normal(block_seed(1, "w"), 99, 5000)
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-6, atol=1e-6)


# Its cost


def test_fill_is_not_far_from_torch_randn() -> None:
    """benchmarks/noise.py holds the target of half the speed; this catches a fall, in time of this process's own."""
    out, ratios = torch.empty(10_000_000), []
    for _ in range(3):
        begin = time.process_time()
        torch.randn(10_000_000)
        between = time.process_time()
        fill_normal_(out, offset=0, **STREAM)
        ratios.append((between - begin) / (time.process_time() - between))
    print(f"fill_normal_ runs at {sorted(ratios)[1]:.2f} of the speed of torch.randn (1e7 elements)")
    assert sorted(ratios)[1] >= 0.3


if __name__ == "__main__":
    compare_kernel_with_slow_form("cpu")
