"""Where a move may go: along a vector, or along noise that is drawn where it is used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elastic_lsopt.space.random.noise import add_normal_, block_seed, fill_normal_
from elastic_lsopt.space.vector import Owner, Vector


@dataclass(frozen=True)
class Noise:
    """Standard normal noise, drawn piece by piece where it is used, so that it never needs a vector of memory.

    An element depends on (seed, step, draw, parameter name, its index in the parameter): the same at any sharding.
    """

    space: Owner
    step: int
    draw: int

    @property
    def _seed(self) -> int:
        return block_seed(self.space.seed, self.step, self.draw)

    def vector(self) -> Vector:
        """The same numbers, kept: one number an element."""
        out = self.space.empty()
        for i, t in enumerate(out.tensors):
            name, offset = self._at(i)
            fill_normal_(t, seed=self._seed, name=name, offset=offset)
        return out

    def _at(self, i: int) -> tuple[str, int]:
        piece = self.space.layout.pieces[i]
        return self.space.layout.parameters[piece.parameter].name, piece.offset

    def add_to(self, i: int, out: Tensor, begin: int, scale: float | Tensor, row_length: int | None = None) -> None:
        """out += scale * the noise of piece i from its element `begin` on; `scale` is one number, or one a row."""
        name, offset = self._at(i)
        add_normal_(out, seed=self._seed, name=name, offset=offset + begin, scale=scale, row_length=row_length)


Direction = Vector | Noise
