"""Whoever looks for a public name finds it in the reference."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

import elastic_lsopt as lso
from tests.processes.ranks import ROOT

pytestmark = pytest.mark.fast

TEXT = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
SHOWN = {*re.findall(r"^::: (\S+)", TEXT, re.M)}


@pytest.mark.parametrize("package", ["", "probes", "elastic"])
def test_each_public_name_stands_in_it(package: str) -> None:
    module = getattr(lso, package) if package else lso
    for name in module.__all__:
        found = getattr(module, name)
        if not isinstance(found, ModuleType):
            # By its public name, or with the module that holds it: a method's says the paper.
            assert {f"{module.__name__}.{name}", found.__module__} & SHOWN, f"{module.__name__}.{name}"
