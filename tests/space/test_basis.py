"""A basis takes memory as vectors come, and multiplies in the vectors' own precision, whatever the user has set."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import elastic_lsopt as lso
from elastic_lsopt.space.basis import BLOCK, SPAN, Basis
from elastic_lsopt.space.geometry import ParameterSpace
from tests.cases.probes.spectra import flat, vector

pytestmark = pytest.mark.fast

MATMUL, CONV = torch.backends.cuda.matmul, torch.backends.cudnn.conv


def a_space(numel: int) -> ParameterSpace:
    model = nn.Linear(numel - 1, 1, dtype=torch.float64)
    return lso.attach(model, lambda m, b: m(b).mean(), [torch.ones(1, numel - 1, dtype=torch.float64)])[0]


def filled(space: ParameterSpace, rows: torch.Tensor, capacity: int) -> Basis:
    basis = Basis(space, capacity)
    for row in rows:
        basis.append(vector(space, row))
    return basis


def test_memory_follows_the_vectors() -> None:
    space = a_space(50)
    basis, seen = Basis(space, 100), []
    for n in range(20):
        seen.append(basis.local_bytes // (50 * 8))
        assert seen[-1] <= (n and -(-n // BLOCK) * BLOCK)
        basis.append(space.zeros())
    assert seen[0] == 0 and sorted(set(seen)) == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    basis.resize(0)
    basis.append(space.zeros())
    assert basis.local_bytes == 3 * BLOCK * 50 * 8  # kept for what comes next


def test_a_full_basis_says_so() -> None:
    space = a_space(4)
    basis = filled(space, torch.eye(4, dtype=torch.float64)[:3], 3)
    assert basis.local_bytes == 3 * 4 * 8
    with pytest.raises(IndexError, match="4 vectors do not fit into a basis of capacity 3"):
        basis.append(space.zeros())
    with pytest.raises(IndexError, match="4 vectors"):
        basis.combine_all_(torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("count,kept", [(3, 2), (BLOCK, BLOCK), (2 * BLOCK + 3, 5), (BLOCK + 1, 2 * BLOCK + 2)])
def test_against_whole_matrices(count: int, kept: int) -> None:
    space, numel = a_space(SPAN + 77), SPAN + 77
    g = torch.Generator().manual_seed(count)
    q, v = torch.randn(count, numel, generator=g).double(), torch.randn(numel, generator=g).double()
    c, p = torch.randn(kept, count, generator=g).double(), torch.randn(2, numel, generator=g).double()
    basis, near = filled(space, q, 40), {"rtol": 1e-12, "atol": 1e-9}
    torch.testing.assert_close(basis.coefficients(vector(space, v)), q @ v, **near)
    torch.testing.assert_close(basis.gram(), q @ q.T, **near)
    torch.testing.assert_close(basis.gram(filled(space, p, 2)), q @ p.T, **near)
    assert basis.gram(Basis(space, 3)).shape == (count, 0) and Basis(space, 3).gram(basis).shape == (0, count)
    torch.testing.assert_close(flat(basis.combine(c[0])), c[0] @ q, **near)
    torch.testing.assert_close(flat(basis.project_out_(vector(space, v), c[0])), v - c[0] @ q, **near)
    basis.combine_all_(c)
    assert len(basis) == kept
    for mine, row in zip(basis, c @ q, strict=True):
        torch.testing.assert_close(flat(mine), row, **near)


def test_empty_ones() -> None:
    space = a_space(5)
    basis = Basis(space, 3)
    assert basis.coefficients(space.zeros()).shape == (0,)
    assert flat(basis.combine(torch.zeros(0))).eq(0).all()
    basis = filled(space, torch.eye(5, dtype=torch.float64)[:2], 3)
    basis.combine_all_(torch.zeros(0, 2))
    assert len(basis) == 0


@pytest.fixture
def low_precision() -> Iterator[None]:
    """What a user sets for speed."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


class Precisions(TorchDispatchMode):
    """The precision of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::addmv_", "aten::bmm"):
            self.seen |= {MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, CONV.fp32_precision}
        return func(*args, **(kwargs or {}))


def problem() -> tuple[ParameterSpace, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = {"x": torch.randn(8, 5), "labels": torch.randint(3, (8,))}
    return lso.attach(model, lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["labels"]), [batch], checked=False)


def test_probes_multiply_in_full_precision_and_leave_the_setting(low_precision: None) -> None:
    space, oracle = problem()
    asked: list[Any] = [
        lambda: lso.probes.lanczos(space, oracle, k=2),
        lambda: lso.probes.lpf(space, oracle, draws=2),
        lambda: lso.probes.sam_sharpness(space, oracle),
        lambda: lso.probes.operator(space, oracle)(space.noise(0).vector()),
    ]
    for ask in asked:
        with Precisions() as mode:
            ask()
        assert mode.seen == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high" and MATMUL.fp32_precision == "tf32"
        assert CONV.fp32_precision == "tf32"  # torch's default
    with Precisions() as mode:
        oracle.gradient()
    assert "tf32" in mode.seen, "a step is as fast as the user wants it"


def test_the_setting_comes_back_after_an_error(low_precision: None) -> None:
    space, oracle = problem()
    with pytest.raises(lso.UserError):
        lso.probes.lanczos(space, oracle, k=0)
    assert torch.get_float32_matmul_precision() == "high"


def test_no_probe_is_left_out() -> None:
    probes = {name: getattr(lso.probes, name) for name in lso.probes.__all__}
    asking = {n: f for n, f in probes.items() if inspect.isfunction(f) and "oracle" in inspect.signature(f).parameters}
    bare = [n for n, f in asking.items() if not hasattr(f, "__wrapped__")]
    assert len(asking) > 20 and set(bare) <= {"operator", "preconditioned"}  # which only give an Operator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_basis_on_a_gpu_is_orthogonal_under_tf32(low_precision: None) -> None:
    model = nn.Linear(20_000, 1).cuda()
    space = lso.attach(model, lambda m, b: m(b).mean(), [torch.ones(1, 20_000, device="cuda")])[0]
    basis = Basis(space, 30)
    for n in range(30):
        v = space.noise(0, n).vector()
        basis.orthogonalise_(v)
        basis.append(v.mul_(1 / space.norm(v)))
    assert (basis.gram() - torch.eye(30, dtype=torch.float64)).abs().max() < 1e-5
