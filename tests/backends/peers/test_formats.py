"""What numbers are after they have travelled in few bits: how far off, how long, and that nothing is lost for good."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt.backends.peers.formats import BLOCK, Format, format_of

pytestmark = pytest.mark.fast
FEW = {f"{bits} bits": format_of(bits) for bits in (16, 8, 4, 2)} | {
    "top 64 in 2 bits": format_of(2, top_k=64), "top 8 of 512": format_of(32, top_k=8, chunk=512),
}  # fmt: skip


def there_and_back(form: Format, x: torch.Tensor) -> torch.Tensor:
    return form.decode(form.encode(x), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4 * BLOCK, dtype=dtype)
    assert torch.equal(there_and_back(format_of(32), x), x)


@pytest.mark.parametrize(("bits", "off"), [(16, 2**-8), (8, 0.5 / 127), (4, 0.5 / 7)])
def test_off_by_half_a_step(bits: int, off: float) -> None:
    """Of bfloat16 relative to each number, else to the largest of its block."""
    x = torch.randn(2, 8 * BLOCK, generator=torch.Generator().manual_seed(0))
    most = (
        x.abs() if bits == 16 else x.view(2, -1, BLOCK).abs().amax(2, keepdim=True).expand(2, -1, BLOCK).reshape(2, -1)
    )
    assert bool(((there_and_back(format_of(bits), x) - x).abs() <= off * most * 1.0001).all())


def test_two_bits_are_lloyds_for_a_normal_distribution() -> None:
    """Max, 1960: four levels equally far apart leave 0.1188 of a normal variable's variance."""
    x = torch.randn(1, 4000 * BLOCK, generator=torch.Generator().manual_seed(1))
    left = (there_and_back(format_of(2), x) - x).square().mean().item()
    assert 0.115 < left < 0.122


@pytest.mark.parametrize("name", FEW)
def test_the_error_is_never_longer_than_the_numbers(name: str) -> None:
    """Which error feedback needs; also of one large number among zeros, of zeros, of tiny and of huge ones."""
    form, draw = FEW[name], torch.Generator().manual_seed(2)
    n = 2 * max(form.step, BLOCK)
    cases = [torch.randn(1, n, generator=draw), torch.zeros(1, n), torch.ones(1, n), torch.full((1, n), 1e-30)]
    cases.append(torch.zeros(1, n).index_fill_(1, torch.tensor([5]), -3.0))
    cases.append(torch.randn(1, n, generator=draw) * 1e30)
    for x in cases:
        back = there_and_back(form, x)
        assert back.isfinite().all() and (back - x).double().norm() <= x.double().norm(), (name, x[0, :8])


@pytest.mark.parametrize("name", FEW)
def test_with_error_feedback_the_sum_arrives(name: str) -> None:
    """What has been told and what is kept back are together what there was, at every time; the rest stays bounded."""
    form, draw = FEW[name], torch.Generator().manual_seed(3)
    n = 2 * max(form.step, BLOCK)
    told, whole, left, longest = torch.zeros(n), torch.zeros(n), torch.zeros(n), 0.0
    for _ in range(200):
        x = torch.randn(n, generator=draw)
        whole += x
        sent = there_and_back(form, (x + left)[None])[0]
        left = x + left - sent
        told += sent
        longest = max(longest, float(left.norm()) / n**0.5)
    assert torch.allclose(told + left, whole, atol=1e-3)
    assert longest < (50 if "top" in name else 1.0)


@pytest.mark.parametrize(
    ("name", "per_element"),
    [("8 bits", 1 + 4 / BLOCK), ("4 bits", 0.5 + 4 / BLOCK), ("2 bits", 0.25 + 4 / BLOCK), ("16 bits", 2.0)],
)
def test_bytes(name: str, per_element: float) -> None:
    assert FEW[name].encode(torch.randn(3, 8 * BLOCK)).shape == (3, int(8 * BLOCK * per_element))


def test_bytes_of_the_largest() -> None:
    """64 of 4,096: 12 bits for the place, two bits for the value, and a scale for 256 of them."""
    form = FEW["top 64 in 2 bits"]
    assert form.encode(torch.randn(1, 16 * 4096)).shape[1] == 8 + 16 * 64 * 12 // 8 + 16 * 64 // 4 + 4 * 4


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("k", "chunks"), [(1, 1), (3, 3), (64, 2), (4096, 1)])
def test_the_largest_are_where_they_were(rows: int, k: int, chunks: int) -> None:
    """Of 4,096 numbers the k largest and zeros, in every place, of an odd number of places too."""
    x = torch.stack([torch.randperm(4096 * chunks, generator=torch.Generator().manual_seed(i)) for i in range(rows)])
    x = (x + 1).float()
    found = there_and_back(format_of(32, top_k=k), x)
    each, kept = x.view(-1, 4096), found.view(-1, 4096)
    assert torch.equal(kept, torch.where(each >= each.topk(k).values[:, -1:], each, 0.0))
