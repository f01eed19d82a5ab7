"""The space of all trainable parameters as one vector: lengths, angles, perturbation, wherever its pieces lie.

Every reduction is one all-reduce of a small fp64 tensor for the whole vector. Reductions say their group in the name:
`norm` is global, `local_square` is this rank's part. Padding is never part of a piece, so it is never part of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from elastic_lsopt.space.adversary import Adversary
from elastic_lsopt.space.copies import WeightCopies
from elastic_lsopt.space.direction import Direction, Noise
from elastic_lsopt.space.layout import Layout, Shards, row_spans
from elastic_lsopt.space.merged import MergedNoise
from elastic_lsopt.space.perturbation import FidelityWatch, Perturbation
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.restricted import RestrictedShards
from elastic_lsopt.space.vector import BorrowedGradient, Scales, Vector

SPAN = 65_536
"""Elements whose products are summed in the vectors' own precision; the sums of the spans are added in fp64."""


def local_square(tensors: Sequence[Tensor]) -> Tensor:
    """This rank's sum of squares, a 0-d fp64 tensor; no communication."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


class ParameterSpace:
    """All trainable parameters as one vector, its pieces where the framework keeps them.

    `shards` is the backend's account of the pieces; `seed` fixes every draw of noise. Collective methods (all norms,
    `dot`, `perturbed`, `perturbation`, `resync`) must be called by all ranks in the same order.
    """

    def __init__(self, shards: Shards, seed: int = 0) -> None:
        self.shards = shards
        self.seed = seed
        self.copies = WeightCopies(shards)
        self.fidelity = FidelityWatch()
        self.merged: MergedNoise | None = None
        """The weights that adapters are added to, for a method that moves them."""
        self.adversary: Adversary | None = None
        """The adapter that moves the weights against the trained one, for a method that has one."""
        self._borrowed: BorrowedGradient | None = None
        wide = any(t.dtype == torch.float64 for t in shards.masters)
        self.dtype = torch.float64 if wide else torch.float32

    # -- vectors -----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self.shards.layout

    def empty(self) -> Vector:
        """A vector of undefined values: one number an element, `layout.local_numel` of them on this rank."""
        flat = torch.empty(self.layout.local_numel, dtype=self.dtype, device=self.shards.device)
        return Vector(self, flat.split([piece.length for piece in self.layout.pieces]))

    def restricted(self, chosen: Sequence[int]) -> ParameterSpace:
        """The parameters of these numbers (in order) as a space of their own, on the same tensors."""
        if len(chosen) == len(self.layout.parameters):
            return self
        space = ParameterSpace(RestrictedShards(self.shards, chosen), self.seed)
        space.copies = self.copies
        return space

    def zeros(self) -> Vector:
        return self.empty().zero_()

    @property
    def weights(self) -> Vector:
        """The weights themselves (the masters), live: read them, never write them; no memory."""
        return Vector(self, self.shards.masters)

    def noise(self, step: int, draw: int = 0) -> Noise:
        """Standard normal noise of (seed, step, draw, parameter, offset) and nothing else; drawn when used."""
        return Noise(self, step, draw)

    def lend(self, gradient: Sequence[Tensor], norm: float) -> BorrowedGradient:
        """The engine's gradient buffer, borrowed, whose global norm is known; the one before it ends."""
        self.end_borrowed()
        self._borrowed = BorrowedGradient(self, gradient, norm)
        return self._borrowed

    def end_borrowed(self) -> None:
        """The gradient buffer is about to change: later reads of the borrowed gradient raise StaleGradient."""
        if self._borrowed is not None:
            self._borrowed.end()
            self._borrowed = None

    def base_state(self, key: str) -> Vector:
        """The base optimizer's state of that name (live, read only). Raises KeyError where it keeps none."""
        return Vector(self, self.shards.base_state(key))

    # -- lengths and angles ------------------------------------------------------------------------------------

    def dot(self, a: Vector, b: Vector) -> float:
        """The global inner product `<a, b>`: products in the vectors' precision, summed in fp64; one all-reduce."""
        parts = [(x * y).sum(dtype=torch.float64) for x, y in zip(a.tensors, b.tensors, strict=True)]
        local = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
        return self._sum(local.reshape(1))[0].item()

    def norm(self, a: Vector) -> float:
        """The global L2 norm; one all-reduce (none for a borrowed gradient as its pass has summed it)."""
        if isinstance(a, BorrowedGradient) and a.valid and a.known_norm is not None:
            self.check_generation()
            return a.known_norm
        return self._sum(local_square(a.tensors).reshape(1))[0].sqrt().item()

    def norm_on_device(self, a: Vector) -> Scales:
        """The global L2 norm as a scale for the whole model, which the host need not wait for; one all-reduce."""
        return Scales(self._sum(local_square(a.tensors).reshape(1)).sqrt(), "model")

    def norm_per_parameter(self, a: Vector) -> Scales:
        """The global L2 norm of each parameter; one all-reduce of one number per parameter."""
        return self.norms_per_parameter(a)[0]

    def norms_per_parameter(self, *vectors: Vector) -> list[Scales]:
        """The same of several vectors, in one all-reduce."""
        total = torch.zeros(len(vectors), len(self.layout.parameters), dtype=torch.float64, device=self.shards.device)
        for own, a in zip(total, vectors, strict=True):
            for piece, t in zip(self.layout.pieces, a.tensors, strict=True):
                own[piece.parameter] += torch.linalg.vector_norm(t, dtype=torch.float64).square()
        return [Scales(norms, "parameter") for norms in self._sum(total).sqrt()]

    def dots_per_parameter(self, *pairs: tuple[Vector, Vector]) -> Tensor:
        """The inner products `<a, b>` of each parameter, a row a pair (fp64, on the device); one all-reduce for all.

        Memory: one vector while it runs.
        """
        total = torch.zeros(len(pairs), len(self.layout.parameters), dtype=torch.float64, device=self.shards.device)
        for own, (a, b) in zip(total, pairs, strict=True):
            for piece, product in zip(self.layout.pieces, (a * b).tensors, strict=True):
                own[piece.parameter] += product.sum(dtype=torch.float64)
        return self._sum(total)

    @full_precision()
    def products(self, left: Sequence[Vector], right: Sequence[Vector]) -> Tensor:
        """The inner products `<l_i, r_j>`, fp64 (left, right) on the host, the same on all ranks; one all-reduce.

        Memory: SPAN numbers a vector while it runs.
        """
        total = torch.zeros(len(left), len(right), dtype=torch.float64, device=self.shards.device)
        mine, others = ([v.tensors for v in vectors] for vectors in (left, right))

        def rows(tensors: list[list[Tensor]], piece: int, begin: int) -> Tensor:
            spans = [t[piece][begin : begin + SPAN] for t in tensors]
            return torch.stack([span.to(total.device, self.dtype) for span in spans])

        for i, piece in enumerate(self.layout.pieces if total.numel() else ()):
            for begin in range(0, piece.length, SPAN):
                total += (rows(mine, i, begin) @ rows(others, i, begin).T).double()
        return self._sum(total).cpu()

    def norm_per_row(self, a: Vector) -> Scales:
        """The global L2 norm of each row (a 1-D parameter is one row); one all-reduce of one number a row."""
        total = torch.zeros(self.layout.rows, dtype=torch.float64, device=self.shards.device)
        for piece, spans, t in zip(self.layout.pieces, self.layout.row_spans, a.tensors, strict=True):
            own = total[self.layout.first_row[piece.parameter] :]
            for span in spans:
                rows = t[span.begin : span.end].view(span.rows, -1)
                square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
                own[span.first : span.first + span.rows] += square
        return Scales(self._sum(total).sqrt(), "row")

    def mean_over_blocks_(self, a: Vector, lengths: Sequence[int]) -> Vector:
        """Each element becomes the mean of its block: `lengths[p]` elements of parameter p that follow each other.

        One all-reduce of a number a block, of those parameters whose blocks are longer than one element; else none.
        """
        parameters = self.layout.parameters
        counts = [p.numel // n if n > 1 else 0 for p, n in zip(parameters, lengths, strict=True)]
        if not any(counts):
            return a
        first = [0, *accumulate(counts)]
        total = torch.zeros(first[-1], dtype=self.dtype, device=self.shards.device)
        cut = []
        for piece, t in zip(self.layout.pieces, a._written(), strict=True):
            number = piece.parameter
            if counts[number]:
                own = total[first[number] : first[number + 1]]
                for span in row_spans(piece.offset, piece.length, lengths[number]):
                    blocks = t[span.begin : span.end].view(span.rows, -1)
                    sums = own[span.first : span.first + span.rows]
                    sums += blocks.sum(1)
                    cut.append((blocks, sums, lengths[number]))
        self._sum(total)
        for blocks, sums, length in cut:
            blocks.copy_((sums / length)[:, None])
        return a

    def _sum(self, local: Tensor) -> Tensor:
        self.check_generation()
        return self.shards.sum_pieces_(local.to(self.shards.device))

    # -- moving ------------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self, direction: Direction, scale: float | Scales = 1.0) -> Iterator[Perturbation]:
        """Weights at w + scale * direction inside the block, restored bit-exactly on exit (collective).

        Memory: one shard in the weights' precision, none where the backend keeps a separate master (ZeRO-1/2, bf16
        ZeRO-3); a perturbation inside another always keeps one shard. After an exception this rank's part is right
        and every gathered copy is refused until `resync()`.
        """
        with self._perturbation(moves_once=True) as walk:
            walk.move(direction, scale)
            del direction  # this frame lives as long as the block: a vector that the caller drops is free at once
            yield walk

    @contextmanager
    def at(self, point: Vector) -> Iterator[Perturbation]:
        """Weights at `point` itself inside the block, back bit for bit on exit (collective). Memory as `perturbed`."""
        with self._perturbation(moves_once=True) as walk:
            walk.to(point)
            yield walk

    def perturbation(self) -> Perturbation:
        """Any number of moves inside the block, then back (collective): `with space.perturbation() as walk:
        walk.move(…)`.

        Memory as `perturbed`; where the weights are narrower than fp32, one fp32 shard for the exact position.
        """
        return self._perturbation(moves_once=False)

    def _perturbation(self, *, moves_once: bool) -> Perturbation:
        return Perturbation(self.shards, self.copies, self.fidelity, moves_once=moves_once)

    # -- copies ------------------------------------------------------------------------------------------------

    @property
    def in_sync(self) -> bool:
        """Whether all copies of the weights are right."""
        return self.copies.in_sync

    def resync(self) -> None:
        """Make all copies of the weights right again after an exception (collective; one gather of the weights)."""
        self.copies.resync()

    def stepped(self) -> None:
        """The base optimizer has rewritten every copy of the weights, and clipped the gradient that it was lent."""
        self.copies.stepped()
        self.end_borrowed()

    def retire(self) -> None:
        """End this generation: every later use of the space or of its vectors raises StaleGeneration."""
        self.copies.retire()

    def check_generation(self) -> None:
        self.copies.check_generation()
