"""Each block of code of each page is run by a test, or read by what would read it; a page needs no line here for that.

Python of a page runs as one program, in an empty folder. A page whose blocks a test of its own runs is named in RUN_BY.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, Block, blocks, program
from tests.docs.checks import json_block, shell_block, yaml_block
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import run

FOLLOWED = "tests/docs/test_followed_pages.py"
RUN_BY = {
    "README.md": ("tests/test_readme.py", ["python"]),
    "docs/data.md": ("tests/training/datasets/test_docs.py", ["yaml", "jsonl", "jinja"]),
    "docs/keys.md": ("tests/config/test_reference.py", ["yaml"]),
    "docs/large-models.md": ("tests/checkpoint/test_hugging_face.py", ["python"]),
    "docs/trainer.md": ("tests/api/test_trainer_page.py", ["python"]),
    "docs/tutorial.md": ("tests/docs/test_tutorial.py", ["python"]),
    **{f"docs/{page}.md": (FOLLOWED, ["python"]) for page in (
        "classification", "fsdp2", "own-method", "own-probe", "own-update", "probes", "zero3",
    )},
}  # fmt: skip
"""The test that runs a page's blocks, and the languages of those."""
CHECKS = {"yaml": yaml_block, "bash": shell_block, "json": json_block, "jsonl": json_block}
NEITHER = {
    "text": "what a program prints",
    "console": "a session at a terminal: an installation, which needs a network, or a command that is to fail",
}
"""Languages of blocks that nothing runs or reads, and why."""


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_run_or_read(page: str) -> None:
    _, run_there = RUN_BY.get(page, ("", []))
    beside = {}
    for block in blocks(page):
        if block.title:
            beside[block.title] = beside.get(block.title, "") + block.text
    for block in blocks(page):
        # The README's shell stands between the words, without a fence.
        language = "bash" if (page, block.language) == ("README.md", "") else block.language
        if language in run_there or language == "python":
            continue
        assert language in CHECKS or language in NEITHER, f"{block}: give it a fence and one of {[*CHECKS, *NEITHER]}"
        CHECKS.get(language, print)(block, beside)


@pytest.mark.fast
@pytest.mark.parametrize("page", RUN_BY)
def test_the_pages_own_test_reads_it(page: str) -> None:
    file, languages = RUN_BY[page]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf'\b(program|blocks|commands|follow)\("{re.escape(page)}"', text), f"{file} does not read {page}"
    assert {*languages} <= {block.language for block in blocks(page)}, f"{page} has no {languages} any more"


PROGRAMS = [page for page in PAGES if "python" not in RUN_BY.get(page, ("", []))[1] and blocks(page, "python")]


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_pages_python_runs(page: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", program(page)], cwd=tmp_path, env=rank_environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("language", "text", "says"),
    [
        ("yaml", "learning_rte: 0.1\n", "learning_rate"),
        ("yaml", "landscape: {method: sam, rh: 0.1}\n", "has no field 'rh'"),
        ("yaml", "averages: {mean: {decay: 0.9}}\n", "mean"),
        ("yaml", "probes: {traec: {every_steps: 1}}\n", "trace"),
        ("yaml", "grid: {widht: [1]}\n", "width"),
        ("yaml", "a: [1\n", "x.md:7"),
        ("bash", "elastic-lsopt trian job.yaml\n", "trian"),
        ("bash", "elastic-lsopt plan job.yaml --cards 8\n", "--cards"),
        ("bash", "A=1 elastic-lsopt train configs/no.yaml\n", "configs/no.yaml does not exist"),
        ("bash", "ls && elastic-lsopt train job.yaml learning_rte=1\n", "ls"),
        ("bash", "elastic-lsopt train job.yaml learning_rte=1 # words\n", "learning_rate"),
        ("bash", "torchrun --nproc-per-knot 2 -m elastic_lsopt.train job.yaml\n", "--nproc-per-knot"),
        ("bash", "torchrun --nproc-per-node 2 \\\n  -m elastic_lsopt.train job.yaml max_steps=0\n", "max_steps"),
        ("bash", "python -m elastic_lsopt.trian job.yaml\n", "elastic_lsopt.trian"),
        ("bash", "make quikstart\n", "quikstart"),
        ("bash", "torchrun --nproc-per-node 2 none.py\n", "none.py does not exist"),
        ("bash", "pip install 'elastic_lsopt[pefft]'\n", "pefft"),
        ("bash", "sbatch launch/none.sbatch job.yaml\n", "launch/none.sbatch does not exist"),
        ("json", '{"zero_optimization": {"stage": 4}}\n', "stage=4"),
    ],
)
def test_a_mistake_is_found(language: str, text: str, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        CHECKS[language](Block("x.md", 7, language, text))
