"""How parameters are dealt to fragments: whole layers, in turn, of about equal size; and their turns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.consensus import registry
from elastic_lsopt.consensus.fragments import fragments_of
from elastic_lsopt.space.layout import Layout, Parameter
from tests.cases import together
from tests.consensus.test_loops import DOUBLE


def layout(**shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(Parameter(name.replace("__", "."), shape) for name, shape in shapes.items()), ())


def names(found: list[list[int]], of: Layout) -> list[list[str]]:
    return [[of.parameters[i].name for i in numbers] for numbers in found]


def test_equal_layers_are_dealt_in_turn() -> None:
    of = layout(**{f"model__layers__{i}__{part}": (3, 4) for i in range(6) for part in ("up__weight", "down__weight")})
    found = fragments_of(of, 3)
    assert found == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_what_is_large_is_with_little_else() -> None:
    of = layout(
        embedding__weight=(30,), layers__0__w=(10,), layers__1__w=(10,), layers__2__w=(10,), layers__3__w=(10,),
        norm__weight=(1,), norm__bias=(1,), head__weight=(30,),
    )  # fmt: skip
    assert names(fragments_of(of, 2), of) == [
        ["embedding.weight", "layers.3.w"],
        ["layers.0.w", "layers.1.w", "layers.2.w", "norm.weight", "norm.bias", "head.weight"],
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_parameter_is_in_one(count: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    space, _ = lso.attach(model, lambda model, x: model(x).sum(), [torch.zeros(1, 3)])
    found = fragments_of(space.layout, count)
    assert sorted(i for numbers in found for i in numbers) == [*range(10)] and all(found)
    assert all(numbers == sorted(numbers) for numbers in found)


def test_more_fragments_than_layers_are_refused() -> None:
    rule = registry.build("streaming_diloco", fragments=4)
    with pytest.raises(lso.UserError, match=r"fragments=4 must be at most 1: whole layers are dealt.*are of 1 \("):
        together.at(rule, [1.0, 2.0])


def test_fragments_take_turns_and_the_others_stay() -> None:
    """Of five layers in two fragments, exchange k moves those of k mod 2, and tells nothing of the others."""
    rule = registry.build("streaming_diloco", fragments=2, tau=4, overlap=0, alpha=0.0, lr=1.0, momentum=0.0)
    members = []
    for value in (1.0, 3.0):
        model = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=DOUBLE) for _ in range(5)))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        space, _ = lso.attach(model, lambda model, x: model(x).sum(), [torch.zeros(1, 1, dtype=DOUBLE)])
        members.append(together.Member(space, {}))
    for m in members:
        m.state.update(rule.init(m.space))
        for t in m.state["old"].tensors:
            t.zero_()
    assert rule.every == 2
    [(_, told), _] = together.heard_of(rule, members, 0)
    assert sum(t.numel() for t in told.tensors) == 3
    assert [m.tolist() for m in together.meet(rule, members, 0)] == [
        [2.0, 1.0, 2.0, 1.0, 2.0],
        [2.0, 3.0, 2.0, 3.0, 2.0],
    ]
    assert [m.tolist() for m in together.meet(rule, members, 1)] == [[2.0] * 5] * 2
