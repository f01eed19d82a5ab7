"""The settings: what is refused, and that no key appears, disappears or goes undocumented unnoticed."""

from dataclasses import FrozenInstanceError, fields

import pytest
from pydantic import ValidationError

from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.pages.schema import json_schema, setting
from elastic_lsopt.config.settings import REFUSED, TrainConfig, landscape_fields, lr_rule

pytestmark = pytest.mark.fast

LEAST = {"dataset": "python-stdlib", "output_dir": "runs/a", "model": {"model_type": "llama"}, "max_steps": 10}

# The public surface. A new key belongs here, in the CHANGELOG and in the shipped schema.
KEYS = [
    "model_name_or_path",
    "model",
    "task",
    "attn_implementation",
    "tokenizer_name_or_path",
    "lora",
    "dataset",
    "dataset_format",
    "dataset_text_field",
    "dataset_label_field",
    "dataset_messages_field",
    "dataset_prompt_field",
    "dataset_completion_field",
    "chat_template",
    "packing",
    "block_size",
    "max_bad_records",
    "eval_fraction",
    "eval_dataset",
    "dataset_cache_dir",
    "output_dir",
    "backend",
    "deepspeed",
    "workers",
    "fsdp_replicas",
    "fsdp_reshard_after_forward",
    "fsdp_cpu_offload",
    "bf16",
    "activation_checkpointing",
    "per_device_train_batch_size",
    "global_batch_size",
    "batch_schedule",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "param_groups",
    "averages",
    "evaluate_average",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "max_grad_norm",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "momentum",
    "landscape",
    "landscape_space",
    "seed",
    "elastic",
    "consensus",
    "probes",
    "eval_steps",
    "eval_batches",
    "compute_metrics",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "max_skipped_steps",
    "on_divergence",
    "rewind_lr_factor",
    "max_rewinds",
    "exit_code_when_stopped",
    "export",
]


ELASTIC_KEYS = [
    "min_nodes", "max_nodes", "policy", "reference_workers", "lr_rule", "ramp_samples", "min_global_batch_size",
    "max_global_batch_size", "min_learning_rate", "max_learning_rate", "max_accumulation", "mirror_every", "copies",
    "mirror_gib", "lease_s", "hang_timeout_s", "join_debounce_s", "drain_timeout_s", "join_timeout_s", "endpoint",
    "address", "secret_file", "witness", "preemption_notice_file", "event_log", "respawn", "max_respawns",
]  # fmt: skip
AUTODROP = {"lr_scheduler_type": "autodrop"}
RAMP = {"kind": "ramp", "max_global_batch_size": 64, "ramp_samples": 1000}
NOISE = {"kind": "noise_scale", "max_global_batch_size": 64}
B64 = {"global_batch_size": 64}


def steps(*given):
    return {"batch_schedule": {"kind": "steps", "steps": [*given]}}


SCALING = {"policy": "scale_batch", "reference_workers": 2}


def test_the_keys_are_the_frozen_public_surface():
    assert [f.name for f in fields(TrainConfig)] == KEYS
    assert [f.name for f in fields(ElasticConfig)] == ELASTIC_KEYS


def test_every_key_says_what_it_is():
    for key, schema in json_schema()["properties"].items():
        assert len(schema["description"]) > 20, key
    for key in ELASTIC_KEYS:
        assert len(setting(f"elastic.{key}")["description"]) > 20, key


def test_settings_are_frozen():
    config = TrainConfig(**LEAST)
    with pytest.raises(FrozenInstanceError):
        config.max_steps = 11


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_keys_of_other_trainers_are_refused_by_name(key):
    with pytest.raises(ValidationError, match=f"{key}: "):
        TrainConfig(**LEAST, **{key: True})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_name_or_path": "folder"}, "exactly one of model_name_or_path"),
        ({"on_divergence": "rewind"}, "set save_steps, or on_divergence: stop"),
        ({"max_rewinds": 1}, "max_rewinds is for on_divergence rewind"),
        ({"rewind_lr_factor": 0.1}, "rewind_lr_factor is for on_divergence rewind"),
        ({"model": None}, "exactly one of model_name_or_path"),
        ({"model": {"hidden_size": 4}}, "exactly one of model_type"),
        ({"model": {"model_type": "llama", "import": "a:b"}}, "exactly one of model_type"),
        ({"model": {"import": "a.b"}}, "package.module:callable"),
        ({"model": {"import": "a:b", "hidden": 4}}, "model.hidden does not go beside import"),
        ({"model": {"import": "a:b", "args": [4]}}, "must be a mapping"),
        ({"task": "classification"}, "needs a torch model"),
        ({"dataset": "digits"}, "digits goes with classification"),
        ({"num_train_epochs": 1.0}, "exactly one of max_steps"),
        ({"max_steps": None}, "exactly one of max_steps"),
        ({"per_device_train_batch_size": 33}, "global_batch_size=32 must be at least per_device_train_batch_size=33"),
        ({"backend": "deepspeed"}, "needs a DeepSpeed JSON"),
        ({"deepspeed": "a.json"}, "set backend: deepspeed"),
        ({"fsdp_replicas": 2}, "backend fsdp2"),
        ({"fsdp_reshard_after_forward": False}, "backend fsdp2"),
        ({"backend": "fsdp2", "workers": 3, "fsdp_replicas": 2}, "must divide workers=3"),
        ({"momentum": 0.9}, "momentum is for optim sgd"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "adam_beta2 is for optim adam"),
        ({"optim": "schedule_free"}, "lr_scheduler_type=linear: schedule_free averages in place of a schedule"),
        ({"evaluate_average": "schedule_free"}, "evaluate_average=schedule_free is not kept"),
        (
            {"optim": "adahessian", "elastic": {**SCALING, "lr_rule": "sqrt"}},
            "lr_rule=sqrt is Adam's, .* no paper says it of adahessian: set elastic.lr_rule: linear or none",
        ),
        ({"landscape": {"rho": 0.1}}, "needs `method`"),
        ({"landscape": {"method": 3}}, "needs `method`"),
        ({"elastic": {"min_nodes": 9, "max_nodes": 8}}, "min_nodes=9 is above max_nodes=8"),
        ({"elastic": {"policy": "scale_batch"}}, "policy=scale_batch needs reference_workers"),
        ({"elastic": {"lr_rule": "sqrt"}}, "lr_rule is for policy scale_batch"),
        ({"elastic": {"ramp_samples": 9}}, "ramp_samples is for policy scale_batch"),
        ({"lr_scheduler_kwargs": {"theta": 1.0}}, "theta is for lr_scheduler_type autodrop, but it is linear"),
        ({**AUTODROP, "lr_scheduler_kwargs": {"theta": 2.0}}, "theta=2 is above upper_theta=1"),
        (
            AUTODROP,
            "lower_lr=0.0001, below which autodrop does not drop, is not below learning_rate=5e-05, so it never",
        ),
        ({**AUTODROP, "lr_scheduler_kwargs": {"lower_lr": 5e-5}}, r"lower_lr=5e-05, .* set it lower \(0: no limit\)"),
        ({**AUTODROP, "lr_scheduler_kwargs": {"decay_ratio": 0.5}}, "decay_ratio is for .*warmup_stable_decay"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "needs lr_scheduler_kwargs: {timescale_samples"),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_ratio": 0.95}, "decay_ratio=0.1 and warmup_ratio=0.95"),
        ({"batch_schedule": {"kind": "ramp", "ramp_samples": 9}}, "needs min_global_batch_size, max_global_batch_size"),
        ({"batch_schedule": {"kind": "ramp", "max_global_batch_size": 64}}, "kind=ramp needs ramp_samples"),
        ({"batch_schedule": {**RAMP, "max_global_batch_size": 32}}, "the ramp begins and ends at 32"),
        ({"batch_schedule": {**RAMP, "max_global_batch_size": 60}}, "60 samples is not a multiple of .*=8"),
        ({"batch_schedule": {**RAMP, "growth": 2.0}}, "growth is for kind noise_scale, but kind=ramp"),
        ({"batch_schedule": {**RAMP, "max_global_batch_size": 512}}, r"16 times .* k \(1 - beta\) must be below 1"),
        ({"batch_schedule": {**RAMP, "lr_rule": "adascale"}}, "adascale is for optim sgd"),
        ({"batch_schedule": RAMP, "elastic": SCALING}, "both set the batch; use keep_batch"),
        ({"batch_schedule": {"kind": "noise_scale"}}, "kind=noise_scale needs max_global_batch_size"),
        ({"batch_schedule": {"kind": "noise_scale", "max_global_batch_size": 24}}, "=24 must be above 32"),
        ({"batch_schedule": {**NOISE, "growth": 1.1}}, "growth=1.1 is below hysteresis=1.25"),
        (steps(), "kind=steps needs steps"),
        (steps({"at": 0.5}), r"steps\[0\]=.* must be one of at and at_samples"),
        (steps({"at": 1.5, **B64}), "at=1.5 must be a share below 1"),
        (steps({"at_samples": 0.5, **B64}), "at_samples=0.5 must be a whole number, above 0"),
        (steps({"at": 0.5, **B64}, {"at": 0.5, **B64}), r"steps\[1\].at=0.5 must be a share below 1, above 0.5"),
        (steps({"at": 0.5, **B64}, {"at_samples": 9, **B64}), "says at_samples and the first does not"),
        (steps({"at": 0.5, "global_batch_size": 0}), "must be an integer >= 1"),
        ({"elastic": {"hang_timeout_s": 1.0}}, "hang_timeout_s=1 must be above lease_s=2"),
        ({"elastic": {"max_nodes": 1, "witness": "etcd://a:1"}}, "witness breaks ties"),
        ({"elastic": {**SCALING, "reference_workers": 3}}, "global_batch_size=32 must be a multiple of .*=8 x .*=3"),
        ({"elastic": {**SCALING, "lr_rule": "adascale"}}, "adascale is for optim sgd"),
        ({"elastic": {**SCALING, "min_global_batch_size": 9, "max_global_batch_size": 8}}, "9 is above .*=8"),
        ({"elastic": {**SCALING, "min_global_batch_size": 25, "max_global_batch_size": 31}}, "no whole number of"),
        ({"elastic": {**SCALING, "max_global_batch_size": 24}}, "global_batch_size=32 lies outside"),
        ({"elastic": {**SCALING, "min_learning_rate": 1e-3}}, "learning_rate=5e-05 lies outside"),
    ],
)
def test_values_that_contradict_each_other(changes, says):
    with pytest.raises(ValidationError, match=says):
        TrainConfig(**{**LEAST, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -1e-9}, {"learning_rate": float("nan")}, {"max_grad_norm": float("inf")},
        {"warmup_ratio": 1.0}, {"eval_fraction": 1.0}, {"adam_beta1": 1.0}, {"adam_epsilon": 0.0},
        {"max_steps": 0}, {"max_steps": 2.5}, {"max_steps": True}, {"workers": "2"}, {"eval_steps": 0},
        {"save_steps": 0}, {"save_total_limit": 0}, {"max_skipped_steps": 0}, {"on_divergence": "go on"},
        {"rewind_lr_factor": 0.0}, {"rewind_lr_factor": 1.5}, {"exit_code_when_stopped": 256},
        {"block_size": 1}, {"seed": -1}, {"bf16": 1}, {"bf16": "yes"},
        {"backend": "ddp"}, {"optim": ""}, {"report_to": ["comet"]}, {"report_to": "tensorboard"},
        {"output_dir": ""}, {"landscape": "sam"}, {"fsdp_reshard_after_forward": 0},
        {"elastic": True}, {"elastic": {"min_nodes": 0}}, {"elastic": {"min_nodes": "2"}}, {"elastic": {"lease_s": 0}},
        {"elastic": {"respawn": 1}}, {"elastic": {"endpoint": "here"}}, {"elastic": {"witness": "a:1"}},
        {"elastic": {"min_node": 1}}, {"elastic": {"copies": 0}},
    ],
)  # fmt: skip
def test_values_out_of_range(wrong):
    with pytest.raises(ValidationError):
        TrainConfig(**{**LEAST, **wrong})


def test_values_at_the_edge_are_taken():
    edge = {"learning_rate": 0, "max_grad_norm": 0.0, "warmup_ratio": 0.0, "eval_fraction": 0.0, "global_batch_size": 8}
    assert TrainConfig(**{**LEAST, **edge}).global_batch_size == 8


def test_the_method_and_its_own_fields():
    config = TrainConfig(**LEAST, landscape={"method": "sam", "rho": 0.1})
    assert landscape_fields(config) == ("sam", {"rho": 0.1})
    assert config.landscape == {"method": "sam", "rho": 0.1}
    assert landscape_fields(TrainConfig(**LEAST)) == ("none", {})


def test_the_rule_is_that_of_the_optimizers_paper_unless_named():
    def rule(optim, **named):
        config = TrainConfig(**LEAST, optim=optim, elastic={**SCALING, **named})
        assert config.elastic is not None
        return lr_rule(config, config.elastic)

    assert [rule(optim) for optim in ("sgd", "adam", "adamw")] == ["linear", "sqrt", "sqrt"]
    assert (rule("sgd", lr_rule="sqrt"), rule("adamw", lr_rule="linear")) == ("sqrt", "linear")
