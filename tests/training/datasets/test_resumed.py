"""Conversations in packed rows: a stopped job goes on at another world size with the samples that were due."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import LLAMA, WORDS, Run, losses, rows, write_job
from tests.training.datasets.small_tokenizers import TAGGED, byte_level


def conversations(path: Path) -> Path:
    """Of one to three turns, whose answers have 1 to 7 words."""
    turns = [
        [
            {"role": role, "content": " ".join(WORDS[: 1 + (i * k + len(role)) % 7])}
            for k in range(1 + i % 3)
            for role in ("user", "assistant")
        ]
        for i in range(30)
    ]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path


def test_a_chat_job_goes_on_at_another_world_size(run: Run, folder: Path) -> None:
    tokenizer = byte_level(folder / "tokenizer", TAGGED)
    given: dict[str, Any] = {
        "dataset": str(conversations(folder / "chat.jsonl")), "tokenizer_name_or_path": str(tokenizer),
        "model": LLAMA, "packing": "documents", "block_size": 160, "max_steps": 4, "save_steps": 2, "eval_steps": None,
        "warmup_ratio": None, "global_batch_size": 5, "dataset_cache_dir": str(folder / "cache"), "export": False,
    }  # fmt: skip
    run(2, write_job(folder / "chat.yaml", **given))
    shutil.copytree(folder / "chat", folder / "chat-resumed")
    shutil.rmtree(folder / "chat-resumed/checkpoints/checkpoint-4")
    assert run(3, write_job(folder / "chat-resumed.yaml", **given))["step"] == 4
    assert [row["world"] for _, row in sorted(rows(folder / "chat-resumed").items())] == [2, 2, 3, 3]
    assert losses(folder / "chat-resumed") == pytest.approx(losses(folder / "chat"), rel=1e-6)
