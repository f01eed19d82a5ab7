"""Matrices with known spectra on a space, a small network's dense Hessian, and the spectral probes on real ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.probes.spectrum.diagonal import diagonal
from elastic_lsopt.probes.spectrum.frobenius import frobenius
from elastic_lsopt.probes.spectrum.hutchpp import hutchpp
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.lobpcg import lobpcg
from elastic_lsopt.probes.spectrum.operator import Operator
from elastic_lsopt.probes.spectrum.power_iteration import power_iteration
from elastic_lsopt.probes.spectrum.spectral_density import spectral_density
from elastic_lsopt.probes.spectrum.xtrace import xtrace
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy


def flat(v: Vector) -> Tensor:
    """Its numbers, on this rank."""
    return torch.cat([t.reshape(-1) for t in v.tensors])


def vector(space: ParameterSpace, values: Tensor) -> Vector:
    """The vector of these numbers."""
    out = space.empty()
    for t, part in zip(out.tensors, values.split([t.numel() for t in out.tensors]), strict=True):
        t.copy_(part)
    return out


def of_matrix(matrix: Tensor, seed: int = 0) -> Operator:
    """The matrix as an operator on a space of its size and precision."""
    n = len(matrix)
    batch = (torch.zeros(2, n, dtype=matrix.dtype), torch.zeros(2, 1, dtype=matrix.dtype))
    model = nn.Linear(n, 1, bias=False).to(matrix.dtype)
    space, _ = lso.attach(model, lambda m, b: (m(b[0]) - b[1]).square().mean(), [batch], seed=seed)

    def apply(v: Vector) -> Vector:
        out = space.empty()
        out.tensors[0].copy_(matrix @ v.tensors[0])
        return out

    return Operator(space, apply)


def symmetric(values: list[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(len(d), len(d), dtype=torch.float64, generator=generator))
    return ((q * d) @ q.T).to(dtype)


def small() -> tuple[Any, Any, Tensor, list[str]]:
    """A small fp64 network's space and oracle, its dense Hessian, and the name of each row's parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    units = engines.batches(1, 3, dtype=torch.float64)[0]
    space, oracle = lso.attach(copy.deepcopy(model), cross_entropy, units)
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    x, y = torch.cat([b[0] for b in units]), torch.cat([b[1] for b in units])

    def loss(w: Tensor) -> Tensor:
        split = zip(named.items(), w.split(sizes), strict=True)
        parts = {name: t.view(p.shape) for (name, p), t in split}
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    w = torch.cat([p.detach().reshape(-1) for p in named.values()])
    assert [p.name for p in space.layout.parameters] == list(named)
    rows = [name for name, size in zip(named, sizes, strict=True) for _ in range(size)]
    return space, oracle, torch.autograd.functional.hessian(loss, w), rows  # type: ignore[return-value]


def probed(kind: str) -> dict[str, Any]:
    """What every spectral probe finds on these ranks: the same at any world size. ZeRO is fp32, all else fp64."""
    dtype = torch.float32 if kind.startswith("zero") else torch.float64
    model = engines.net((), dtype)
    engine = engines.build(kind, model, lso.Plain())
    units = engines.mine(engines.batches(1, 3, dtype=dtype)[0])
    space, oracle = engine.space, engine.oracle(units)
    top = lanczos(space, oracle, k=3, which="both", tolerance=1e-5, capacity=30, vectors=True)
    assert top.vectors
    power = power_iteration(space, oracle, k=2, tolerance=1e-2)
    block = lobpcg(space, oracle, k=3, tolerance=1e-4, vectors=True)
    assert block.vectors
    density = spectral_density(space, oracle, vectors=2, steps=8, parameters="second.*")
    d = diagonal(space, oracle, samples=4)
    out = {
        "lanczos": [*top.eigenvalues, *top.vectors.gram().abs().sum(1).tolist()],
        "host": list(lanczos(space, oracle, k=1, basis_device="cpu", tolerance=1e-5).eigenvalues),
        "same space": top.vectors.gram(block.vectors)[:3].square().sum().item(),
        "power": list(power.eigenvalues),
        "lobpcg": list(block.eigenvalues),
        "products": [top.products, power.products, block.products, density.products],
        "density": [*density.nodes[1], *density.weights[1], density.dimension],
        "hutchpp": hutchpp(space, oracle, samples=3).value,
        "xtrace": xtrace(space, oracle, samples=4).value,
        "frobenius": frobenius(space, oracle, samples=3).value,
        "diagonal": [space.norm(d.values), d.standard_error],
        "local": len(top.vectors) * space.layout.local_numel * dtype.itemsize == top.vectors.local_bytes,
    }
    engines.close(engine)
    return out
