"""Coordinates in which every filter has length 1: what the flatness measures of the LPF paper are taken in.

    p_r = |W_r| + |b_r|         W_r a filter (a row of a matrix), b_r its bias
    w'  = w / p                 each filter with its own p: g' = p g, H' = diag(p) H diag(p), noise in w is p z

Bisla, Wang, Choromanska 2022, "Low-Pass Filtering SGD …", authors' code: `model.norm()` divides filter and bias by p
and multiplies the layer's output by p, so the function stays what it was. p is held fixed, so the same numbers come
from the weights as they are, perturbed by p times the direction: nothing is rewritten. Differs in: 1. that needs no
ReLU after the layer; 2. a norm's gain and bias are filters of one element (gain_r, b_r), as are other 1-D parameters;
3. a filter of zeros keeps p = 1, where the code divides by 0.

Cost: no pass; memory: one vector; one all-reduce of two numbers a filter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Unpack

import torch
from torch import Tensor

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.operator import On, Operator, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Layout
from elastic_lsopt.space.vector import Vector


def filter_norms(space: ParameterSpace, of: Vector | None = None) -> Vector:
    """p at every element of its filter, of `of` (default: the weights where they are now); always > 0 (collective)."""
    filters, count = _filters(space.layout)
    biases = [_weight_of(space.layout, i) is not None for i in range(len(filters))]
    totals = torch.zeros(2, count, dtype=torch.float64, device=space.shards.device)
    for piece, span, values in _runs(space, filters, (of or space.weights).tensors):
        part = totals[int(biases[piece]), span]
        part += values.double().abs().sum(1) if biases[piece] else values.double().square().sum(1)
    space.check_generation()
    squares, absolute = space.shards.sum_pieces_(totals)
    p = squares.sqrt() + absolute
    p[p == 0] = 1.0
    out = space.empty()
    for _, span, values in _runs(space, filters, out.tensors):
        values.copy_(p[span, None].expand_as(values))
    return out


def normalised(space: ParameterSpace, oracle: Oracle, **on: Unpack[On]) -> Operator:
    """diag(p) H diag(p): the curvature in those coordinates, at the present weights; memory: two vectors more."""
    a, p = operator(space, oracle, **on), filter_norms(space)
    product: Callable[[Vector], Vector] = a.apply

    return Operator(space, lambda v: product(v * p).mul_(p), a.parameters)


def _weight_of(layout: Layout, number: int) -> int | None:
    """The matrix or gain whose bias this parameter is: `x.weight` of `x.bias`, with as many filters."""
    bias = layout.parameters[number]
    prefix, _, last = bias.name.rpartition(".")
    if last != "bias" or len(bias.shape) != 1:
        return None
    wanted = f"{prefix}.weight" if prefix else "weight"
    for i, p in enumerate(layout.parameters):
        if p.name == wanted and p.shape and p.shape[0] == bias.numel:
            return i
    return None


def _filters(layout: Layout) -> tuple[list[int], int]:
    """The number of each parameter's first filter, and how many there are."""
    first, total = [-1] * len(layout.parameters), 0
    for i, p in enumerate(layout.parameters):
        if _weight_of(layout, i) is None:
            first[i] = total
            total += p.rows if len(p.shape) > 1 else p.numel
    for i in range(len(first)):
        weight = _weight_of(layout, i)
        if weight is not None:
            first[i] = first[weight]
    return first, total


def _runs(space: ParameterSpace, first: list[int], tensors: list[Tensor]) -> Iterator[tuple[int, slice, Tensor]]:
    """(parameter, its filters, those filters' elements here as (filters, elements)) of this rank."""
    layout = space.layout
    for piece, spans, t in zip(layout.pieces, layout.row_spans, tensors, strict=True):
        origin = first[piece.parameter]
        if len(layout.parameters[piece.parameter].shape) <= 1:
            at = origin + piece.offset
            yield piece.parameter, slice(at, at + piece.length), t[:, None]
            continue
        for span in spans:
            rows = slice(origin + span.first, origin + span.first + span.rows)
            yield piece.parameter, rows, t[span.begin : span.end].view(span.rows, -1)
