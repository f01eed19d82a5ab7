"""What a DeepSpeed JSON may say, and that DeepSpeed itself takes what we make of it."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from elastic_lsopt.config.deepspeed_json import check_job, engine_json, read_deepspeed_json, split_method, zero_stage
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast

SHIPPED = sorted(Path(__file__).parents[2].glob("configs/deepspeed/*.json"))
JOB = TrainConfig(
    dataset="python-stdlib", output_dir="runs/a", model={"model_type": "llama"}, max_steps=10, backend="deepspeed",
    deepspeed="zero.json", global_batch_size=32, per_device_train_batch_size=8, max_grad_norm=0.5, bf16=True,
)  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_files_say_their_stage_and_nothing_that_contradicts_a_job(path):
    config = read_deepspeed_json(path)
    assert f"zero{zero_stage(config)}" == path.stem
    check_job(config, JOB)


def test_there_is_a_file_for_each_stage():
    assert [path.stem for path in SHIPPED] == ["zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"elasticity": {"enabled": True}}, "elasticity is refused"),
        ({"elasticity": {}}, "elasticity is refused"),
        ({"fp16": {"enabled": True}}, "fp16 is refused.*use bf16"),
        ({"amp": {"enabled": True}}, "amp is refused.*use bf16"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is refused.*lr_scheduler_type"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "it is for stage 1, 2 or 3, but stage=0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "it is for stage 3, but stage=2"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "'nvme' is not tested; use.* cpu"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is refused: write offload_optimizer"),
        ({"zero_optimization": {"stage": 4}}, "stage=4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "stage='3' must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "stage=True must be 0, 1, 2 or 3"),
        ({"zero_optimization": 3}, "zero_optimization must be a block"),
        ({"fp16": "auto"}, "fp16 must be a block"),
        ({"bf16": True}, "bf16 must be a block"),
        ({"optimizer": "sam"}, "optimizer must be a block"),
    ],
)
def test_blocks_that_are_refused(block, says):
    with pytest.raises(UserError, match=says) as caught:
        read_deepspeed_json(block)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "block",
    [
        {"fp16": {"enabled": False}}, {"fp16": {"enabled": "auto", "loss_scale": 0}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "cpu_offload": False}},
        {"zero_optimization": {"stage": 3, "offload_param": None}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ],
)  # fmt: skip
def test_blocks_that_are_taken(block):
    assert read_deepspeed_json(block) == block


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "a": 1,\n}', ":3: broken JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("\x00", ":1: broken JSON"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_broken_files_are_one_line(tmp_path, text, says):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_deepspeed_json(path)
    assert str(path) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_mapping_is_copied():
    given = {"zero_optimization": {"stage": 1}}
    read_deepspeed_json(given)["zero_optimization"]["stage"] = 3
    assert given == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("name", ["sam", "SAM"])
def test_a_method_is_taken_out_of_the_optimizer_block(name):
    base = {"type": "AdamW", "params": {"lr": 1e-5}}
    given = {"optimizer": {"type": name, "params": {"rho": 0.1, "base": base}}, "zero_optimization": {"stage": 2}}
    before = deepcopy(given)
    rest, method, params = split_method(given, ["none", "sam"])
    assert (rest, method, params) == ({"zero_optimization": {"stage": 2}}, "sam", {"rho": 0.1, "base": base})
    assert given == before


@pytest.mark.parametrize("given", [{}, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, {"optimizer": {}}])
def test_another_optimizer_stays_deepspeeds(given):
    assert split_method(given, ["sam"]) == (given, None, {})


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64.*global_batch_size=32"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4.*per_device_train_batch_size=8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is refused"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0.*max_grad_norm=0.5"),
        ({"gradient_clipping": 0}, "gradient_clipping=0.*max_grad_norm=0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False.*bf16=True"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is refused.*optim"),
    ],
)
def test_a_json_that_contradicts_its_job_is_refused(said, says):
    with pytest.raises(UserError, match=says):
        check_job(said, JOB)


@pytest.mark.parametrize(
    "said",
    [
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
        },
        {key: "auto" for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")},
        {"bf16": {"enabled": "auto"}, "gradient_clipping": "auto"},
        {},
    ],
)
def test_a_json_that_agrees_or_is_silent_is_taken(said):
    check_job(said, JOB)


def test_the_engine_gets_numbers_that_are_all_written():
    said = {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 4,
        "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto", "check_grad_overflow": False},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False},
    }  # fmt: skip
    before = deepcopy(said)
    assert engine_json(said, world=6, max_grad_norm=0, bf16=True) == {
        "train_batch_size": 6, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31 - 1,
    }  # fmt: skip
    assert said == before
    assert json.loads(json.dumps(engine_json({}, world=1, max_grad_norm=1, bf16=False)))["bf16"] == {"enabled": False}
