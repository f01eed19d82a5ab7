"""The principal components of a trajectory, from the Gram matrix of its sharded differences.

    G_ij = <d_i, d_j>      d_i = w_i - w_start      i: the points that are kept
    B    = J G J           J = 1 - 11'/n: differences from the mean point instead
    B    = U diag(s) U'    explained_k = s_k / tr B      coordinate_jk = sqrt(s_k) U_jk
    direction_k = sum_j U_jk d_j / sqrt(s_k)             of length 1

A window keeps every `stride`-th point and the newest one; when it is full, every second point goes and the stride
doubles, so a run of any length stays within the window and is seen from its start.

Gower 1966, "Some distance properties of latent root and vector methods used in multivariate analysis" (centring);
Li, Xu, Taylor, Studer, Goldstein 2018, "Visualizing the Loss Landscape of Neural Nets", section 7, who keep all points
and subtract the last one instead of the mean. The signs, which are free, are such that sum_j j^2 coordinate_jk > 0.
Cost: no pass; n^2 dots in one all-reduce; memory: the window's vectors (on the CPU if asked), one a direction.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector


class Window:
    """At most `capacity` points of a trajectory, as differences from any one point, with the samples seen at each.

    Memory: `capacity` vectors, on `device` "cpu" if host memory has more room.
    """

    def __init__(self, space: ParameterSpace, capacity: int, device: torch.device | str | None = None) -> None:
        if capacity < 3:
            raise UserError(f"window={capacity} must be >= 3 points.")
        self.capacity = capacity
        self.differences = Basis(space, capacity, device)
        self.samples: list[int] = []
        self.stride = 1
        self._seen = 0

    def __len__(self) -> int:
        return len(self.differences)

    def add(self, difference: Vector, samples: int) -> None:
        """Keep a copy of the newest point; no communication."""
        if self._seen and (self._seen - 1) % self.stride:
            self._keep(len(self) - 1)  # the newest so far was between two strides
        if len(self) == self.capacity:
            self.differences.combine_all_(torch.eye(self.capacity, dtype=torch.float64)[::2])
            self.samples = self.samples[::2]
            self.stride *= 2
        self.differences.append(difference)
        self.samples.append(samples)
        self._seen += 1

    def _keep(self, count: int) -> None:
        self.differences.resize(count)
        self.samples = self.samples[:count]

    def state_dict(self) -> State:
        """All that it holds, by name: copies of its vectors, and numbers."""
        out: State = {"stride": self.stride, "seen": self._seen, "count": len(self)}
        for i, samples in enumerate(self.samples):
            out |= {f"samples.{i}": samples, f"difference.{i}": self.differences[i]}
        return out

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state. Raises UserError where it does not fit into this window."""
        count = int(state["count"])  # type: ignore[arg-type]
        if count > self.capacity:
            raise UserError(f"window={self.capacity} is smaller than the {count} points saved; make it {count}.")
        self._keep(0)
        for i in range(count):
            self.differences.append(state[f"difference.{i}"])  # type: ignore[arg-type]
            self.samples.append(int(state[f"samples.{i}"]))  # type: ignore[arg-type]
        self.stride, self._seen = int(state["stride"]), int(state["seen"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Components:
    """The leading components: `explained[k]` of the variance, `coordinates[j][k]` of point j, `directions[k]`.

    `samples` says when each point was. Components whose share is below `resolution`, what rounding alone can explain,
    are left out, so there may be fewer than asked for.
    """

    explained: tuple[float, ...]
    coordinates: tuple[tuple[float, ...], ...]
    directions: tuple[Vector, ...]
    samples: tuple[int, ...]
    resolution: float
    seconds: float


@full_precision()
def trajectory_pca(window: Window, *, components: int = 2) -> Components:
    """Up to `components` >= 1 principal components of the points in the window (collective).

    Raises UserError for fewer than two points or points that are all the same, NonFinite for inf or NaN.
    """
    began = time.monotonic()
    n = len(window)
    if components < 1:
        raise UserError(f"components={components} must be >= 1.")
    if n < 2:
        raise UserError(f"the trajectory has {n} point(s); its principal components need 2 or more.")
    gram = window.differences.gram()
    if not bool(gram.isfinite().all()):
        raise NonFinite("the trajectory holds inf or NaN.")
    rows = gram.mean(dim=0, keepdim=True)
    centred = gram - rows - rows.T + gram.mean()
    total = centred.trace().item()
    rounding = torch.finfo(window.differences.space.dtype).eps * n * gram.diagonal().max().item()
    if not total > rounding:
        raise UserError("the points of the trajectory are all the same; observe it after steps that move the weights.")
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(components, int((values > rounding).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    vectors = vectors * torch.where(torch.arange(n).double().square() @ vectors < 0, -1.0, 1.0)
    lengths = values.sqrt()
    return Components(
        tuple((values / total).tolist()),
        tuple(tuple(row) for row in (vectors * lengths).tolist()),
        tuple(window.differences.combine(c) for c in (vectors / lengths).T),
        tuple(window.samples),
        rounding / total,
        time.monotonic() - began,
    )
