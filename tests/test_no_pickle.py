"""Nothing from a network or a disk is unpickled: the package has no call that would, and no rank makes one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import elastic_lsopt

PACKAGE = Path(elastic_lsopt.__file__).parent
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.distributed.checkpoint"}
"""What reads pickles (torch's distributed checkpoint: its ranks' plans too)."""
CALLS = {
    "torch.load", "dist.all_gather_object", "dist.gather_object", "dist.broadcast_object_list",
    "dist.scatter_object_list", "dist.send_object_list", "dist.recv_object_list", "dist.rpc", "numpy.load", "np.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load",
}  # fmt: skip
NAMES = {call.rpartition(".")[2] for call in CALLS if "object" in call}
BETWEEN_OWN_PROCESSES = {"study/pool.py"}
"""May use multiprocessing's pipes: both ends are this program's, and no address leads to them."""


def findings(source: str, name: str = "") -> list[str]:
    out = []
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in CALLS or node.attr in NAMES):
            out.append(ast.unparse(node))
        banned = MODULES | (set() if name in BETWEEN_OWN_PROCESSES else {"multiprocessing", "torch.multiprocessing"})
        out += [m for m in imported if m in CALLS or any(m == b or m.startswith(f"{b}.") for b in banned)]
    return out


def test_the_package_has_no_call_that_unpickles() -> None:
    found = {
        str(path.relative_to(PACKAGE)): bad
        for path in PACKAGE.rglob("*.py")
        if (bad := findings(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE))))
    }
    assert found == {}, "send JSON by backends/agreement.py, and read safetensors"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "import torch.distributed.checkpoint as dcp", "from torch.distributed.checkpoint import save",
        "import torch\ntorch.distributed.broadcast_object_list([])", "import yaml\nyaml.load('')",
        "from multiprocessing.connection import Listener",
    ],
)  # fmt: skip
def test_and_such_a_call_would_be_found(source: str) -> None:
    assert findings(source)


def test_ranks_save_resume_and_export_without_a_pickle(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run("tests.cases.checkpoints.no_pickle:checkpoint_and_export", path=str(tmp_path)) == [[], []]
