"""Leaving the weights and coming back bit for bit.

    with space.perturbed(direction, scale): ...          one move
    with space.perturbation() as walk: walk.move(d, s); …   any number of moves; restart(d, s): from the beginning

[Note: what a perturbation keeps] The way back is never computed as (w + e) - e, which differs from w by rounding. An
outermost perturbation on a backend with a separate master rebuilds the working copy from the master and keeps nothing;
every other perturbation keeps a copy of this rank's working shard as it found it. So nested perturbations return to
exactly the perturbed weights that they started from.

[Note: where a move is computed] Where masters and Vectors are: on the host, where a framework has offloaded them and
keeps the working weights on a GPU. So the same noise is drawn whether or not a piece's working copy is elsewhere.

[Note: returning after an exception] The rank that raises restores its own shard without a collective, because the
other ranks may be anywhere. Gathered copies stay wrong until the collective `space.resync()`, and are refused till
then. So one rank's failure never hangs another in a restore. Where there is no other copy, nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite
from elastic_lsopt.space.copies import WeightCopies
from elastic_lsopt.space.direction import Direction, Noise
from elastic_lsopt.space.layout import Layout, Shards, row_spans
from elastic_lsopt.space.vector import Scales, Vector

CHUNK = 1 << 20
"""Elements of the scratch through which a move in fp32 reaches narrower weights (4 MiB)."""


@dataclass(frozen=True)
class Fidelity:
    """How a requested perturbation looks to the forward pass, after rounding to its precision (global figures)."""

    requested_norm: float
    realised_norm: float
    cosine: float

    @property
    def norm_ratio(self) -> float:
        return self.realised_norm / self.requested_norm if self.requested_norm else 1.0


@dataclass
class FidelityWatch:
    """Whether the moves of a space are measured, and what the last one gave."""

    always: bool = False
    narrow: bool = False
    """Measure also unasked where the forward is narrower than fp32."""
    last: Fidelity | None = None

    def measures(self, shards: Shards) -> bool:
        return self.always or (self.narrow and shards.compute_dtype.itemsize < 4)


class Perturbation:
    """A way out of the weights and back; see [Note: what a perturbation keeps]. `fidelity` is filled when asked for."""

    def __init__(self, shards: Shards, copies: WeightCopies, watch: FidelityWatch, *, moves_once: bool) -> None:
        self._shards, self._copies, self._watch = shards, copies, watch
        self.fidelity: Fidelity | None = None
        self._moves_once = moves_once
        self._moves = 0
        self._saved: list[Tensor] | None = None
        self._position: list[Tensor] | None = None

    def __enter__(self) -> Perturbation:
        shards, copies = self._shards, self._copies
        copies.check_generation()
        copies.refuse_stale("a perturbation")
        shards.drop_gathered()
        if copies.perturbations or not shards.separate_master:
            self._saved = [t.detach().clone() for t in shards.working]
        copies.perturbations += 1
        return self

    def move(self, direction: Direction, scale: float | Scales = 1.0) -> None:
        """Weights += scale * direction, in fp32 arithmetic whatever the working precision (collective).

        `scale` is a number, or one for the model, a parameter or a row (`Scales`).
        """
        if self._moves_once and self._moves:
            raise RuntimeError("perturbed() is one move; use space.perturbation() for several.")
        shards = self._shards
        shards.drop_gathered()
        working = list(shards.working)
        narrow = any(t.element_size() < 4 for t in working)
        base: list[Tensor] = working if self._saved is not None or self._moves else list(shards.masters)
        if narrow and not self._moves_once:
            if self._position is None:
                self._position = [t.to(shards.device, _wide(t), copy=True) for t in base]
            base = self._position
        before = [t.to(shards.compute_dtype, copy=True) for t in base] if self._watch.measures(shards) else None
        with torch.no_grad():
            for i, (out, origin) in enumerate(zip(working, base, strict=True)):
                _add_piece(shards, i, out, origin, direction, scale, keep_position=self._position is not None)
        if before is not None:
            self.fidelity = self._watch.last = _measure(shards, before, working, direction, scale)
        self._moves += 1
        self._copies.rewritten()
        shards.refresh_gathered()

    def restart(self, direction: Direction, scale: float | Scales = 1.0) -> None:
        """Weights = those where the block began + scale * direction, from wherever they are (collective).

        One way out for several draws: what is kept of the beginning is kept once.
        """
        shards = self._shards
        shards.drop_gathered()
        working = list(shards.working)
        base = self._saved if self._saved is not None else list(shards.masters)
        self._position = None
        before = [t.to(shards.compute_dtype, copy=True) for t in base] if self._watch.measures(shards) else None
        with torch.no_grad():
            for i, (out, origin) in enumerate(zip(working, base, strict=True)):
                _add_piece(shards, i, out, origin, direction, scale, keep_position=False)
        if before is not None:
            self.fidelity = self._watch.last = _measure(shards, before, working, direction, scale)
        self._moves += 1
        self._copies.rewritten()
        shards.refresh_gathered()

    def to(self, point: Vector) -> None:
        """Weights = point, rounded only where the working copy is narrower: w + (point - w) would round (collective).

        `move` may follow, from there.
        """
        shards = self._shards
        shards.drop_gathered()
        working = list(shards.working)
        with torch.no_grad():
            torch._foreach_copy_(working, point.tensors)
        if not self._moves_once and any(t.element_size() < 4 for t in working):
            self._position = [t.clone() for t in point.tensors]
        self._moves += 1
        self._copies.rewritten()
        shards.refresh_gathered()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shards, copies = self._shards, self._copies
        copies.perturbations -= 1
        self._position = None
        shards.drop_gathered()
        with torch.no_grad():
            torch._foreach_copy_(list(shards.working), self._saved if self._saved is not None else list(shards.masters))
        self._saved = None
        copies.rewritten()
        if error is None:
            copies.returned()
            return
        if shards.sole:
            return
        # See [Note: returning after an exception]
        copies.mark_stale(f"{type(error).__name__} inside a perturbed pass")
        if isinstance(error, Exception) and not isinstance(error, NonFinite):
            shards.report_failure(error)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _add_piece(
    shards: Shards,
    i: int,
    out: Tensor,
    origin: Tensor,
    direction: Direction,
    scale: float | Scales,
    *,
    keep_position: bool,
) -> None:
    """out = origin + scale * direction for piece i; through a bounded scratch where `out` is narrower or elsewhere."""
    layout, home = shards.layout, shards.device
    if out.element_size() >= 4 and out.device.type == home.type:
        if out is not origin:
            out.copy_(origin)
        _add_run(layout, i, out, 0, direction, scale)
        return
    for begin in range(0, out.numel(), CHUNK):
        span = slice(begin, min(begin + CHUNK, out.numel()))
        exact = origin[span] if keep_position else origin[span].to(home, _wide(out), copy=True)
        _add_run(layout, i, exact, begin, direction, scale)
        out[span].copy_(exact)


def _add_run(layout: Layout, i: int, out: Tensor, begin: int, direction: Direction, scale: float | Scales) -> None:
    """out += scale * elements [begin, begin + len(out)) of piece i of the direction."""
    piece = layout.pieces[i]
    if isinstance(scale, Scales) and scale.per == "row":
        parameter = layout.parameters[piece.parameter]
        first = layout.first_row[piece.parameter]
        rows = scale.values[first : first + parameter.rows]
        if isinstance(direction, Noise):
            direction.add_to(i, out, begin, rows, parameter.row_length)
            return
        d = direction.tensors[i][begin : begin + out.numel()]
        for span in row_spans(piece.offset + begin, out.numel(), parameter.row_length):
            part, s = slice(span.begin, span.end), rows[span.first : span.first + span.rows]
            out[part].view(span.rows, -1).addcmul_(d[part].view(span.rows, -1).to(out.dtype), s[:, None].to(out.dtype))
        return
    # A 0-d tensor stays on the device: to read it would wait, once per parameter.
    s = scale.values[0 if scale.per == "model" else piece.parameter] if isinstance(scale, Scales) else float(scale)
    if isinstance(direction, Noise):
        direction.add_to(i, out, begin, s)
        return
    d = direction.tensors[i][begin : begin + out.numel()]
    if isinstance(s, Tensor):
        out.addcmul_(d.to(out.dtype), s.to(out.dtype))
    else:
        out.add_(d, alpha=s)


def _measure(
    shards: Shards,
    before: list[Tensor],
    working: list[Tensor],
    direction: Direction,
    scale: float | Scales,
) -> Fidelity:
    """Requested against realised perturbation; one all-reduce of three numbers, scratch of one piece."""
    sums = torch.zeros(3, dtype=torch.float64, device=shards.device)
    for i, (was, now) in enumerate(zip(before, working, strict=True)):
        asked = torch.zeros(now.numel(), dtype=_wide(now), device=shards.device)
        _add_run(shards.layout, i, asked, 0, direction, scale)
        got = now.to(shards.compute_dtype).to(asked) - was.to(asked)
        sums += torch.stack([x.sum(dtype=torch.float64) for x in (asked.square(), got.square(), asked * got)])
    asked2, got2, both = shards.sum_pieces_(sums).tolist()
    cosine = both / (asked2 * got2) ** 0.5 if asked2 * got2 > 0 else float(asked2 == got2)
    return Fidelity(asked2**0.5, got2**0.5, cosine)
