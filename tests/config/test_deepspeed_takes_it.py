"""DeepSpeed's own parser reads what `engine_json` makes (slow to import, so not among the fast tests)."""

from pathlib import Path

import pytest

from elastic_lsopt.config.deepspeed_json import engine_json, read_deepspeed_json

SHIPPED = sorted(Path(__file__).parents[2].glob("configs/deepspeed/*.json"))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_deepspeed_reads_what_we_give_it(path, bf16, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for key in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(key, raising=False)
    config_module = pytest.importorskip("deepspeed.runtime.config")
    read = config_module.DeepSpeedConfig(engine_json(read_deepspeed_json(path), world=1, max_grad_norm=0.25, bf16=bf16))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (1, 1, 1)
    assert (read.gradient_clipping, f"zero{read.zero_config.stage}") == (0.25, path.stem)
    assert read.bfloat16_config.enabled is bf16
    assert read.zero_allow_untested_optimizer is True
