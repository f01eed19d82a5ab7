"""The examples in public docstrings give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import elastic_lsopt as lso

PACKAGE = Path(lso.__file__).parent
MODULES = sorted(
    ".".join(("elastic_lsopt", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if " >>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.fast
@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of(module: str) -> None:
    found = import_module(module)
    done = doctest.testmod(found, extraglobs={"lso": lso, "torch": torch})
    assert done.attempted > 0 and done.failed == 0
