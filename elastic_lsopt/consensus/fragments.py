"""The parameters cut into fragments that are exchanged one at a time: whole layers, dealt in turn.

    embedding (30)   layers.0 (10)   layers.1 (10)   layers.2 (10)   layers.3 (10)   head (30)
    fragment 0       1               1               1               0               1

A layer is all parameters whose names begin alike up to their first number (`model.layers.3.`), else a module's own
parameters. In the model's order, each goes to the fragment that has the fewest elements so far, so equal layers are
dealt in turn (the paper's strided pattern), and a large embedding does not make one exchange much longer than others.
"""

from __future__ import annotations

import re

from elastic_lsopt.errors import UserError
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Layout, Parameter
from elastic_lsopt.space.restricted import RestrictedShards
from elastic_lsopt.space.vector import Vector


def fragments_of(layout: Layout, count: int) -> list[list[int]]:
    """The numbers of each fragment's parameters, in order: the same on every rank of every replica.

    Raises UserError where there are fewer layers than fragments.
    """
    layers: dict[str, list[int]] = {}
    for number, parameter in enumerate(layout.parameters):
        layers.setdefault(_layer(parameter), []).append(number)
    if len(layers) < count:
        raise UserError(
            f"fragments={count} must be at most {len(layers)}: whole layers are dealt to fragments, and the trained "
            f"parameters are of {len(layers)} ({', '.join([*layers][:3])}{' …' if len(layers) > 3 else ''})."
        )
    out: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for numbers in layers.values():
        smallest = sizes.index(min(sizes))
        out[smallest] += numbers
        sizes[smallest] += max(1, sum(layout.parameters[i].numel for i in numbers))
    return [sorted(numbers) for numbers in out]


def _layer(parameter: Parameter) -> str:
    numbered = re.match(r"(?:.*?\.)?\d+\.", parameter.name)
    return numbered.group() if numbered else parameter.name.rpartition(".")[0]


def within(part: ParameterSpace, whole: Vector) -> Vector:
    """What a Vector of the whole space has in a part of it: its own tensors, not copies."""
    shards = part.shards
    return Vector(part, shards.of(whole.tensors)) if isinstance(shards, RestrictedShards) else whole
