"""A living job on a Hugging Face folder: newcomers and survivors fill their shards, the losses are undisturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import LLAMA, Started, command, in_ranks, losses, rows, write_job

SHAPE: dict[str, Any] = {"max_steps": 60, "eval_steps": None, "save_steps": None, "workers": 2, "model": None}


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_kill_and_a_join(tmp_path: Path, ranks: Callable[[int], Any], backend: str) -> None:
    shape = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": 257}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**shape)).save_pretrained(
        tmp_path / "folder", max_shard_size="10kB"
    )
    own = {} if backend == "fsdp2" else {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}
    settings = SHAPE | own | {"model_name_or_path": str(tmp_path / "folder")}
    job, run = write_job(tmp_path / "run.yaml", **settings, elastic={}), tmp_path / "run"
    started = Started(command("none", job), tmp_path)
    started.until(lambda: bool(rows(run)) and rows(run)[max(rows(run))]["world"] == 2 and max(rows(run)) >= 4)
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in started.workers()}
    os.kill(next(pid for pid, said in environments.items() if b"ELASTIC_LSOPT_WORKER=" in said), signal.SIGKILL)
    assert started.wait() == 0, started.output
    assert {row["world"] for row in rows(run).values()} == {1, 2}, read_journal(run)
    assert read_journal(run)[-1]["source"] == "memory", read_journal(run)
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "undisturbed.yaml", **settings)))
    assert losses(run) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
    card = (run / "model" / "README.md").read_text()
    assert "## Members" in card and "base_model: folder" in card
