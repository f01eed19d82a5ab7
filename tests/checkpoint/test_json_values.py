"""State that is no tensor by pieces goes through JSON and comes back as it was, type and all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_lsopt.checkpoint.json_values import decode, encode, number
from elastic_lsopt.errors import Unsupported

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
single = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(single, lambda inner: st.lists(inner) | st.lists(inner).map(tuple), max_leaves=8)


@given(values)
def test_what_is_no_tensor(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value, "x"))), CPU)
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_element(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.full(shape, 1 / 3 if dtype.is_floating_point else 3, dtype=dtype)
    [back] = decode(json.loads(json.dumps(encode([value], "x"))), CPU)
    assert back.dtype == dtype and back.shape == shape and torch.equal(back, value)


def test_what_has_no_place_is_named() -> None:
    for value, found in ((torch.zeros(2, 3), r"a tensor of shape \(2, 3\)"), ({1, 2}, "a set")):
        with pytest.raises(Unsupported, match=f"exp_avg of w is {found}"):
            encode(value, "exp_avg of w")


def test_the_number_in_a_scalar() -> None:
    assert number(encode(torch.tensor(2.5), "x")) == 2.5 and number(3) == 3.0 and number(True) == 1.0
    assert number(None) == number("7") == number([1.0]) == 0.0
