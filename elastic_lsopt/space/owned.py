"""Vectors of whole tensors, each on one rank: what an update keeps of a matrix that is dealt to a rank (`dealing.py`).

    parameter "a" (13 x 7) on rank 1     gram0 of "a" (13 x 13) on rank 1, gram1 (7 x 7) on rank 1

Such a Vector belongs to a space of its own: its parameters have the names of the model's and other shapes, its pieces
are whole. Checkpoint and mirror go by name, offset and length, so a rank that is dealt the matrix later, in another
world, is the one that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elastic_lsopt.space.layout import Layout, Parameter, Piece
from elastic_lsopt.space.vector import Owner, Vector


class OwnedSpace:
    """Of tensors of these shapes, by the names of parameters of `space`; this rank has those in `mine`."""

    def __init__(self, space: Owner, shapes: Mapping[str, tuple[int, ...]], mine: Sequence[str], like: Tensor) -> None:
        self.seed, self._space, self._like = space.seed, space, like
        parameters = tuple(Parameter(name, shape) for name, shape in shapes.items())
        own = [i for i, p in enumerate(parameters) if p.name in mine]
        self.layout = Layout(parameters, tuple(Piece(i, 0, parameters[i].numel, slot, 0) for slot, i in enumerate(own)))

    def empty(self) -> Vector:
        return Vector(self, [self._like.new_empty(piece.length) for piece in self.layout.pieces])

    def zeros(self) -> Vector:
        return self.empty().zero_()

    def check_generation(self) -> None:
        self._space.check_generation()

    def norm(self, a: Vector) -> float:
        """This rank's part alone: no sum is formed over what each rank owns."""
        return float(torch.stack([t.double().square().sum() for t in a.tensors] or [torch.zeros(())]).sum().sqrt())


def wholes(vector: Vector) -> dict[str, Tensor]:
    """What this rank has of an owned Vector, by parameter: views in their shapes."""
    layout = vector.space.layout
    pairs = [(layout.parameters[piece.parameter], t) for piece, t in zip(layout.pieces, vector.tensors, strict=True)]
    return {parameter.name: t.view(parameter.shape) for parameter, t in pairs}
