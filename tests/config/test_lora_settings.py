"""The `lora:` block and `landscape_space`: what contradicts what, in one line with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.config.load import ConfigFile
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast
JOB: dict[str, Any] = {
    "dataset": "python-stdlib", "output_dir": "runs/a", "model": {"model_type": "llama"}, "max_steps": 1,
    "lora": {"r": 4}, "landscape": {"method": "flat_lora"}, "landscape_space": "merged",
}  # fmt: skip
AGAINST = {"landscape": {"method": "bi_lora"}, "landscape_space": "trained"}
ZERO = {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}}


def config(**changes: Any) -> Any:
    values = {k: v for k, v in (JOB | changes).items() if v is not None}
    return ConfigFile(path=Path("job.yaml"), values=values, places={}).config()


def test_names_are_pefts_without_their_prefix() -> None:
    lora = config(lora={"r": 4, "alpha": 8, "target_modules": ["q_proj"], "base_dtype": "bf16"}).lora
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (4, 8, 0.0, ("q_proj",))
    assert (lora.base_dtype, lora.export, config(lora={}).lora.target_modules) == ("bf16", "adapter", "all-linear")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": None}, "flat_lora moves the weights that adapters are merged into; add a lora block"),
        ({"landscape_space": "trained"}, "flat_lora moves the merged weights; set landscape_space: merged"),
        ({"landscape": {"method": "sam"}}, "but method=sam: its way up is the gradient of the merged weights"),
        ({"landscape": {"method": "asam"}}, "but method=asam: its way up is the gradient of the merged weights"),
        ({"landscape": {"method": "lpf_sgd"}}, "but method=lpf_sgd: of other methods it is not tested"),
        ({"landscape": {"method": "none"}}, "but method=none: it moves nothing; remove the key"),
        ({**AGAINST, "lora": None},
         "landscape: bi_lora trains a second adapter against that of LoRA; add a lora block"),
        ({"landscape": {"method": "bi_lora"}}, "but method=bi_lora: of other methods it is not tested; remove the key"),
        ({**AGAINST, "optim": "schedule_free",
          "lr_scheduler_type": "constant"},
         "optim=schedule_free keeps the weights in other places too, and bi_lora moves them when it has stepped"),
        ({**AGAINST, "lr_scheduler_type": "autodrop", "learning_rate": 0.01},
         "lr_scheduler_type=autodrop looks how the weights turn"),
        ({**AGAINST, "batch_schedule": {"kind": "noise_scale", "max_global_batch_size": 64}},
         "and with bi_lora that of its adversary is in it; use ramp"),
        ({**AGAINST, "optim": "sgd",
          "elastic": {"policy": "scale_batch", "reference_workers": 1, "lr_rule": "adascale"}},
         "and with bi_lora that of its adversary is in it; use linear"),
        ({"lora": {"base_dtype": "bf16"}, **ZERO}, "lora.base_dtype=bf16 under DeepSpeed.*needs bf16: true"),
        ({"lora": {"base_dtype": "nf4"}}, "lora.base_dtype=nf4 is refused"),
        ({"lora": {"lora_alpha": 4}}, "unknown key 'lora.lora_alpha'; did you mean 'alpha'?"),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout=1.0 must be a number >= 0 and < 1"),
        ({"lora": {"export": "none"}}, "lora.export='none' must be one of adapter, merged, both"),
        ({"backend": "replicated", "fsdp_cpu_offload": True}, "fsdp_cpu_offload is for backend fsdp2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_stand(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)
