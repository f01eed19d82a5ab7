"""A direction whose filters are as long as the model's own, so that slices of differently scaled models compare.

    d_f <- d_f |w_f| / (|d_f| + 1e-10)      f: a row of `space.layout` (an output neuron, a convolution's filter)
    d_p <- 0                                p: a parameter of fewer than two dimensions (bias, a norm's gain)

Li, Xu, Taylor, Studer, Goldstein 2018, "Visualizing the Loss Landscape of Neural Nets"; as in the authors' code with
`norm="filter", ignore="biasbn"`. A filter is an index of the first axis, so in an embedding it is a token's vector, and
in a fused query-key-value matrix a row of it.
Cost: no pass; memory: the result; two all-reduces of one number a row.
"""

from __future__ import annotations

from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

TINY = 1e-10


def filter_normalised(space: ParameterSpace, direction: Vector) -> Vector:
    """`direction` with every filter as long as that of the present weights, as an own vector (collective)."""
    out = direction.clone()
    factor = (space.norm_per_row(space.weights).values / (space.norm_per_row(out).values + TINY)).to(space.dtype)
    for piece, spans, t in zip(space.layout.pieces, space.layout.row_spans, out.tensors, strict=True):
        if len(space.layout.parameters[piece.parameter].shape) < 2:
            t.zero_()
            continue
        own = factor[space.layout.first_row[piece.parameter] :]
        for span in spans:
            rows = t[span.begin : span.end].view(span.rows, -1)
            rows.mul_(own[span.first : span.first + span.rows, None])
    return out
