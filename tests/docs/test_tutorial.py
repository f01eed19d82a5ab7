"""The tutorial, followed from top to bottom: daily with a small model in place of the one that it fine-tunes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from elastic_lsopt.cli.main import main
from tests.docs.blocks import Block, blocks
from tests.docs.followed import Typed, follow
from tests.jobs import losses, rows

STEPS = 10


def installs(block: Block) -> bool:
    return "pip install" in block.text


def follow_it(folder: Path, small: bool) -> list[Typed]:
    """All that the page says after the installation; `small` exchanges the model once it is there."""
    first = [
        block
        for block in blocks("docs/tutorial.md")
        if "prepare.py" in (block.title, block.text.removeprefix("python ").strip())
    ]
    assert len(first) == 2
    told = follow("docs/tutorial.md", folder, lambda block: block in first)
    if small:
        shrink(folder / "minilm")
    return told + follow("docs/tutorial.md", folder, lambda block: block not in first and not installs(block))


def shrink(model: Path) -> None:
    """The same kind of model with the same tokenizer, and random weights that are few."""
    from transformers import AutoConfig, AutoModel

    shape = AutoConfig.from_pretrained(model)
    shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size = 16, 1, 2, 32
    shutil.rmtree(model / "1_Pooling", ignore_errors=True)
    AutoModel.from_config(shape).save_pretrained(model)


def check(folder: Path, told: list[Typed]) -> None:
    plain, sam, shards = (losses(folder / f"runs/{name}") for name in ("plain", "sam", "shards"))
    assert len(plain) == len(sam) == STEPS and plain[0] == sam[0] and plain[1:] != sam[1:]
    assert shards == pytest.approx(sam, rel=2e-3)
    for name, passes in (("plain", 1), ("sam", 2)):
        assert {row["passes"] for row in rows(folder / f"runs/{name}").values()} == {passes}
    by_command = {" ".join(typed.words[:2]): typed.output for typed in told}
    assert "Fits from 1 rank on, in 8.0 GiB per GPU" in by_command["elastic-lsopt plan"]
    assert all(name in by_command["elastic-lsopt runs"] for name in ("plain", "sam", "shards"))
    [answer] = (folder / "runs/sam/probes").glob("*/probes.json")
    assert {*json.loads(answer.read_text())["probes"]} == {"sam_sharpness", "gradient_norm"}
    for file in ("config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html"):
        assert (folder / "runs/sam" / file).exists(), file


def test_with_a_small_model(tmp_path: Path) -> None:
    told = follow_it(tmp_path, small=True)
    check(tmp_path, told)
    assert re.fullmatch(r"((code|comment) \| .*\n){2}", told[-1].output), told[-1].output


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_as_it_stands(tmp_path: Path) -> None:
    told = follow_it(tmp_path, small=False)
    check(tmp_path, told)
    assert [line.split(" | ")[0] for line in told[-1].output.splitlines()] == ["comment", "code"]
    assert all(rows(tmp_path / f"runs/{name}")[STEPS]["eval_accuracy"] > 0.9 for name in ("plain", "sam", "shards"))


def test_the_mistake_is_told_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow("docs/tutorial.md", tmp_path, lambda block: block.title == "job.yaml")
    assert main(["validate", "job.yaml", "learning_rte=0.1"]) == 2
    [shown] = blocks("docs/tutorial.md", "text")
    assert capsys.readouterr().err == shown.text
