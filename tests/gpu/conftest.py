"""What is here needs a device: `make test-gpu` runs it there, and `TESTS_ON=cpu make test-gpu` everywhere else."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "TESTS_ON" not in os.environ:
        for item in items:
            if "tests/gpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))
