"""How the weights move: what common optimizers do, seen from the points that they pass.

    u_t = w_t - w_{t-1}                                        the update between two observations
    cos = (|a + b|^2 - |a - b|^2) / 4                          a = u_t / |u_t|, b = u_{t-1} / |u_{t-1}|
    angle = 2 atan2(|a - b|, |a + b|)                          radians; exact where acos(cos) is all rounding
    angular velocity = angle / (m_t - m_{t-1})                 radians a sample; m_t: samples half-way along u_t
    distances |w_t - w_start|, |w_t - w_mark|;  path length sum |u_t|;  |u_t| / |w_{t-1}| of each parameter
    alignment of x with v_1 .. v_k: cos(x, v_i), and |P x|^2 / |x|^2, P the projection onto their span

Gur-Ari, Roberts, Dyer 2018, "Gradient Descent Happens in a Tiny Subspace" (alignment); Kahan 2006, "How Futile are
Mindless Assessments of Roundoff in Floating-Point Computation?" (angle). Half-way marks make the velocity of a uniform
circular motion exact for observations at uneven times too.
Cost: no pass; memory: three vectors (the start, the last point, the last update), one more after `mark()`, two while
observing, and the window's; communication: six all-reduces of at most one number a parameter, three an alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import atan2, inf, isfinite, nan

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.method import State
from elastic_lsopt.probes.trajectory.trajectory_pca import Window
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class Alignment:
    """Cosine with each vector, and the share of the squared length that lies in their span."""

    cosines: tuple[float, ...]
    share: float


@dataclass(frozen=True)
class Motion:
    """One observation; lengths in units of the weights. Cosine, angle and velocity are NaN until there are two updates.

    `update_to_weight` is by parameter name: inf where a parameter left 0.
    """

    samples: int
    cosine: float
    angle: float
    angular_velocity: float
    update_norm: float
    path_length: float
    distance_from_start: float
    distance_from_mark: float
    update_to_weight: dict[str, float]
    update_alignment: Alignment | None
    gradient_alignment: Alignment | None


class Trajectory:
    """Observes a run from the present weights on: `observe(clock)` after a step, as often as it is to be seen.

    `window` > 0 keeps that many points for `trajectory_pca`, on `device`; `samples` are those seen so far. It is a
    state family (oracle/family.py): where an engine has it, it goes on after a resume and after a change of members.
    `now` gives the samples at which it begins anew where a checkpoint knows nothing of it (default: `samples`).
    """

    name = "trajectory"
    same_on_all_replicas = False

    def __init__(
        self, space: ParameterSpace, *, samples: int = 0, window: int = 0, device: torch.device | str | None = None,
        now: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self.space = space
        self._now = now if now is not None else lambda: samples
        self._capacity, self._device = window, device
        self.begin()

    def begin(self) -> None:
        """From the present weights on, as if nothing had been seen."""
        self.samples = self._now()
        self.path_length = 0.0
        self.window = Window(self.space, self._capacity, self._device) if self._capacity else None
        self._start = self.space.weights.clone()
        self._last = self._start.clone()
        self._mark: Vector | None = None
        self._update: Vector | None = None
        self._update_norm, self._middle = nan, nan
        if self.window is not None:
            self.window.add(self.space.zeros(), self.samples)

    def empty(self, key: str) -> Vector:
        """The window's vectors lie where the window does."""
        device = self._device if key.startswith("window.") and self._device is not None else self.space.shards.device
        pieces = self.space.layout.pieces
        return Vector(self.space, [torch.zeros(p.length, dtype=self.space.dtype, device=device) for p in pieces])

    def mark(self) -> None:
        """Measure `distance_from_mark` from the present weights on (before the first call: from the start)."""
        self._mark = self.space.weights.clone()

    def observe(
        self,
        at: SampleClock | int,
        *,
        gradient: Vector | None = None,
        eigenvectors: Basis | Sequence[Vector] | None = None,
    ) -> Motion:
        """What has happened since the last observation; `at` is the clock, or the samples seen so far (collective).

        With `eigenvectors` (independent ones, k vectors of memory unless a Basis) the alignment of the update, and of
        a `gradient`, is told. Raises UserError where no samples were seen since the last observation, NonFinite where
        the weights are inf or NaN (the observation does not count then).
        """
        space = self.space
        samples = at.samples if isinstance(at, SampleClock) else at
        if samples <= self.samples:
            raise UserError(f"samples={samples} must be > {self.samples}, where the trajectory was observed last.")
        update = space.weights - self._last
        moved = space.norm_per_parameter(update).values
        norm = moved.square().sum().sqrt().item()
        if not isfinite(norm):
            raise NonFinite(f"the update that ends at sample {samples} has length {norm}.")
        before = space.norm_per_parameter(self._last).values
        ratios = [u / w if w else (inf if u else 0.0) for u, w in zip(moved.tolist(), before.tolist(), strict=True)]
        vectors = _basis(space, eigenvectors)
        update_alignment = None if vectors is None else alignment(space, update, vectors)
        gradient_alignment = None if vectors is None or gradient is None else alignment(space, gradient, vectors)
        middle = (self.samples + samples) / 2
        cosine, angle = self._turn(update, norm)
        velocity = angle / (middle - self._middle)
        self.path_length += norm
        self.samples = samples
        self._last.copy_(space.weights)
        if norm > 0.0:  # a skipped step has no direction: the next one turns from the one before
            self._update, self._update_norm, self._middle = update, norm, middle
        difference = self._last - self._start
        from_start = from_mark = space.norm(difference)
        if self.window is not None:
            self.window.add(difference, samples)
        if self._mark is not None:
            from_mark = space.norm(difference.copy_(self._last).add_(self._mark, alpha=-1.0))
        return Motion(
            samples, cosine, angle, velocity, norm, self.path_length, from_start, from_mark,
            dict(zip((p.name for p in space.layout.parameters), ratios, strict=True)),
            update_alignment, gradient_alignment,
        )  # fmt: skip

    def _turn(self, update: Vector, norm: float) -> tuple[float, float]:
        """Cosine and angle from the last update to this one."""
        if self._update is None or norm == 0.0:
            return nan, nan
        chord = (update * (1 / norm)).add_(self._update, alpha=-1 / self._update_norm)
        apart = self.space.norm(chord)
        together = self.space.norm(chord.add_(self._update, alpha=2 / self._update_norm))
        return (together**2 - apart**2) / 4, 2 * atan2(apart, together)

    def state_dict(self) -> State:
        """All that it remembers, by name, as a method's state: Vectors (live, the window's copied) and numbers."""
        out: State = {"samples": self.samples, "path_length": self.path_length, "start": self._start}
        out["last"] = self._last
        if self._mark is not None:
            out["mark"] = self._mark
        if self._update is not None:
            out |= {"update": self._update, "update_norm": self._update_norm, "middle": self._middle}
        if self.window is not None:
            out |= {f"window.{key}": value for key, value in self.window.state_dict().items()}
        return out

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state (its vectors are copied); a window saved without one here is left aside."""
        self.samples, self.path_length = int(state["samples"]), float(state["path_length"])  # type: ignore[arg-type]
        self._start.copy_(_vector(state, "start"))
        self._last.copy_(_vector(state, "last"))
        self._mark = _vector(state, "mark").clone() if "mark" in state else None
        self._update, self._update_norm, self._middle = None, nan, nan
        if "update" in state:
            self._update = _vector(state, "update").clone()
            self._update_norm, self._middle = float(state["update_norm"]), float(state["middle"])  # type: ignore[arg-type]
        if self.window is not None and "window.count" in state:
            inside = {k.removeprefix("window."): v for k, v in state.items() if k.startswith("window.")}
            self.window.load_state_dict(inside)


def alignment(space: ParameterSpace, v: Vector, vectors: Basis | Sequence[Vector]) -> Alignment:
    """How far v points along the vectors, which need not be orthogonal but independent; NaN for a zero v (collective).

    Three all-reduces. Raises UserError for vectors that are not independent.
    """
    basis = _basis(space, vectors)
    if basis is None or not len(basis):
        raise UserError("eigenvectors is empty; give one or more.")
    norm = space.norm(v)
    gram, c = basis.gram(), basis.coefficients(v)
    values = torch.linalg.eigvalsh(gram)
    if not values[0] > torch.finfo(space.dtype).eps * values[-1]:
        raise UserError("the eigenvectors are not independent; give each direction once.")
    if not norm:
        return Alignment((nan,) * len(basis), nan)
    inside = (c @ torch.linalg.solve(gram, c)).item()
    return Alignment(tuple((c / gram.diagonal().sqrt() / norm).tolist()), inside / norm**2)


def _basis(space: ParameterSpace, vectors: Basis | Sequence[Vector] | None) -> Basis | None:
    if vectors is None or isinstance(vectors, Basis):
        return vectors
    basis = Basis(space, len(vectors))
    for v in vectors:
        basis.append(v)
    return basis


def _vector(state: State, name: str) -> Vector:
    value = state[name]
    assert isinstance(value, Vector)
    return value
