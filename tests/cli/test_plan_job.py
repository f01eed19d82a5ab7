"""`elastic-lsopt plan` as a user meets it: what it prints for small and for very large models, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.estimate.job import what_to_change
from elastic_lsopt.training.estimate.rank import RankMemory
from tests.docs.blocks import commands

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
SMALL = [f"model.{key}" for key in ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2")]
JOB = """
dataset: corpus.jsonl
output_dir: runs/large
backend: fsdp2
bf16: true
activation_checkpointing: true
block_size: 4096
per_device_train_batch_size: 1
global_batch_size: 512
max_steps: 1000
landscape: {method: sam, rho: 0.05}
"""
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_405B = LLAMA_70B | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("elastic-lsopt: ") and printed.err.count("\n") == 1
    return printed.err


# The published counts: Llama 3, 70.6 and 405.9 thousand million.
@pytest.mark.parametrize(
    ("shape", "parameters", "folder"),
    [
        (LLAMA_70B, 70_553_706_496, True),
        (LLAMA_405B, 405_853_388_800, False),
    ],
)
def test_a_very_large_model_is_planned_in_20_seconds(capsys, tmp_path, shape, parameters, folder):
    job = tmp_path / "job.yaml"
    if folder:  # a config, and neither weights nor a tokenizer
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text(json.dumps(shape))
        job.write_text("model_name_or_path: model" + JOB)
    else:
        job.write_text(f"model: {json.dumps(shape)}" + JOB)
    begin = time.process_time()  # of this process alone: others share the cores
    out = told(capsys, str(job), "--gpu-memory", "80GiB", "--worlds", "8,64,512")
    assert time.process_time() - begin < 20
    assert out["parameters"] == parameters
    by_world = {one["world"]: one for one in out["worlds"]}
    # fp32 masters, Adam's two states and SAM's way back, each 4 bytes per parameter.
    kept = by_world[64]["device_bytes"]
    assert kept["kept"]["weights"] == 4 * -(-parameters // 64)
    assert kept["kept"]["optimizer state"] == 8 * -(-parameters // 64)
    assert kept["in_pass"]["way back of a perturbation"] == 4 * -(-parameters // 64)
    assert [by_world[w]["fits"] for w in (8, 512)] == [False, True]
    assert 8 < out["smallest_world"] <= 512
    # Each of 512 micro-batches of a step gathers the bf16 weights twice, in each of SAM's two passes.
    assert by_world[64]["sent_bytes_per_step"]["weights"] == round(2 * 8 * 2 * 2 * parameters * 63 / 64)


# 32 blocks of 4096, 11008 in between, 32000 ids. LoRA of rank r on a linear layer adds r (in + out).
LLAMA_7B = LLAMA_70B | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize("shape", [LLAMA_7B, pytest.param(LLAMA_70B, marks=pytest.mark.full)])
def test_a_large_model_with_lora_is_planned_in_20_seconds(capsys, tmp_path, shape):
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {json.dumps(shape)}" + JOB + "lora: {r: 16, alpha: 32, base_dtype: bf16}\n")
    begin = time.process_time()
    out = told(capsys, str(job), "fsdp_cpu_offload=true", "--gpu-memory", "80GiB", "--worlds", "8")
    assert time.process_time() - begin < 20
    h, m, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * 128
    layers, ids = shape["num_hidden_layers"], shape["vocab_size"]
    base = layers * (2 * h * h + 2 * h * kv + 3 * h * m + 2 * h) + 2 * ids * h + h
    adapters = 16 * layers * (2 * 2 * h + 2 * (h + kv) + 3 * (h + m))
    assert (out["parameters"], out["frozen_parameters"]) == (adapters, base)
    [one] = out["worlds"]
    host, device = one["offloaded_bytes"], one["device_bytes"]
    # On the host a share of the base in bf16; of the adapters fp32 weights, Adam's two states, SAM's way back.
    assert host["kept"]["frozen weights"] == 2 * -(-base // 8)
    assert host["kept"]["weights"] == 4 * -(-adapters // 8) == host["in_pass"]["way back of a perturbation"]
    assert host["kept"]["optimizer state"] == 8 * -(-adapters // 8)
    assert sum(device["kept"].values()) == 0 and out["smallest_world"] is not None
    assert device["in_pass"].get("gradients before their reduction", 0) < 2 * adapters
    # 64 forwards a pass and rank, the block gathered again in the backward, two passes; reductions are the adapters'.
    assert one["sent_bytes_per_step"]["weights"] == pytest.approx(2 * 64 * 2 * 2 * (base + adapters) * 7 / 8, rel=1e-9)
    assert one["sent_bytes_per_step"]["gradients"] == pytest.approx(2 * 64 * 4 * adapters * 7 / 8, rel=1e-9)


def test_what_is_offloaded_has_a_table_and_leaves_the_gpu(capsys):
    given = (QUICKSTART, *SMALL, "fsdp_cpu_offload=true", "--worlds", "2")
    after, before = (told(capsys, *some)["worlds"][0] for some in (given, [g for g in given if "offload" not in g]))
    assert sum(before["offloaded_bytes"]["kept"].values()) == before["offloaded_bytes"]["peak"] == 0
    assert after["offloaded_bytes"]["kept"].items() <= before["device_bytes"]["kept"].items()
    assert after["device_bytes"]["peak"] < before["device_bytes"]["peak"]
    assert main(["plan", *given]) == 0
    out = capsys.readouterr().out
    device, host = out.split("Host memory per rank")
    assert "optimizer state" in host and "optimizer state" not in device and "own versions" not in host


ZERO3 = {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("part", "how", "says"),
    [
        ("frozen weights", {"lora": LoraConfig()}, "set lora.base_dtype: bf16"),
        ("frozen weights", {"lora": LoraConfig(base_dtype="bf16")}, "set fsdp_cpu_offload: true"),
        ("frozen weights", {"lora": LoraConfig(), **ZERO3}, "set bf16: true"),
        ("optimizer state", {}, "set fsdp_cpu_offload: true"),
        ("optimizer state", {"fsdp_cpu_offload": True}, "set bf16: true, or train fewer parameters"),
        ("optimizer state", ZERO3, 'set "offload_optimizer": {"device": "cpu"} in its JSON'),
        ("weights", ZERO3, 'set "offload_param": {"device": "cpu"} in its JSON'),
    ],
)
def test_what_to_change_by_the_largest_part(part, how, says):
    given = {"model": {"model_type": "llama"}, "dataset": "a", "max_steps": 1, "output_dir": "b", "backend": "fsdp2"}
    config = TrainConfig(**given | how)
    told = what_to_change(config, RankMemory(kept={part: 2, "probes": 1}, in_pass={}, in_step={}))
    assert told == f"{part} are the largest part: {says}"


def test_the_smallest_world_is_the_first_that_fits(capsys):
    given = (QUICKSTART, *SMALL, "global_batch_size=512", "landscape={method: none}")
    room = told(capsys, *given, "--worlds", "3")["worlds"][0]["device_bytes"]["peak"] * 1.1
    out = told(capsys, *given, "--gpu-memory", f"{int(room) + 1}B")
    assert out["smallest_world"] == 3
    assert {one["world"]: one["fits"] for one in out["worlds"]} == {
        1: False, 2: False, 3: True, 4: True, 8: True, 16: True, 32: True, 64: True,
    }  # fmt: skip


def test_what_fits_nowhere_says_what_to_change_and_ends_with_1(capsys):
    assert main(["plan", QUICKSTART, *SMALL, "--gpu-memory", "1MiB"]) == 1
    out = capsys.readouterr().out
    assert "Fits on no world up to 4096 ranks in 1.0 MiB per GPU" in out
    assert out.endswith("activations are the largest part: set activation_checkpointing: true.\n")
    checkpointed = [*SMALL, "activation_checkpointing=true"]
    assert main(["plan", QUICKSTART, *checkpointed, "--gpu-memory", "100KiB"]) == 1
    assert "lower per_device_train_batch_size" in capsys.readouterr().out


def test_the_policy_says_batch_and_rate(capsys):
    scale = "elastic={policy: scale_batch, reference_workers: 4, max_nodes: 8, max_global_batch_size: 48}"
    given = (QUICKSTART, *SMALL, "workers=1", "learning_rate=1e-3")
    out = told(capsys, *given, scale, "--worlds", "1,4,8")["worlds"]
    # sqrt for AdamW: the rate of 32 samples times the root of what the batch became.
    assert [(one["global_batch_size"], round(one["learning_rate"], 7)) for one in out] == [
        (8, 0.0005), (32, 0.001), (48, round(1e-3 * 1.5**0.5, 7)),
    ]  # fmt: skip
    assert out[2]["held_by"].startswith("max_global_batch_size=48") and out[0]["held_by"] == ""
    assert all(sum(one["host_bytes"].values()) > 0 for one in out)
    # A schedule of the batch is planned for its largest, with the rate that its rule gives there.
    ramp = "batch_schedule={kind: ramp, max_global_batch_size: 128, ramp_samples: 1000}"
    for more in ([], ["elastic={max_nodes: 8}"]):
        [grown] = told(capsys, *given, ramp, *more, "--worlds", "2")["worlds"]
        assert (grown["global_batch_size"], grown["forwards_per_pass"], grown["learning_rate"]) == (128, 8, 2e-3)
    kept = told(capsys, *given, "elastic={max_nodes: 8}", "--worlds", "1,2,8")["worlds"]
    assert [(one["global_batch_size"], one["forwards_per_pass"]) for one in kept] == [(32, 4), (32, 2), (32, 1)]


def test_time_and_price(capsys):
    given = (QUICKSTART, *SMALL, "max_steps=1000", "block_size=128", "--worlds", "2,4")
    out = told(capsys, *given, "--tokens-per-second", "1000", "--price-per-hour", "3")["worlds"]
    # SAM: two passes of 32 samples of 128 tokens per step, shared by the ranks.
    hours = [1000 * 2 * 32 * 128 / world / 1000 / 3600 for world in (2, 4)]
    assert [one["hours"] for one in out] == pytest.approx(hours)
    assert [one["price"] for one in out] == pytest.approx([hours[0] * 2 * 3, hours[1] * 4 * 3])
    assert main(["plan", QUICKSTART, *SMALL, "--worlds", "2", "--tokens-per-second", "1000"]) == 0
    assert "hours" in capsys.readouterr().out


def test_halves_of_the_ranks_run_a_batch_each(capsys):
    """Four micro-batches of 8: SAMPa's two passes take the time of one, and no world is odd."""
    given = (QUICKSTART, *SMALL, "backend=replicated", "optim=sgd", "max_steps=1000", "block_size=128")
    speed = ("--tokens-per-second", "1000")
    halves = told(capsys, *given, "landscape={method: sampa, halves: true}", *speed)["worlds"]
    assert [one["world"] for one in halves] == [2, 4, 8, 16, 32, 64]
    assert [one["forwards_per_pass"] for one in halves] == [4, 2, 1, 1, 1, 1]
    serial = told(capsys, *given, "landscape={method: sampa}", *speed, "--worlds", "2,4,8,16,32,64")["worlds"]
    ratios = [ours["hours"] / theirs["hours"] for ours, theirs in zip(halves, serial, strict=True)]
    assert ratios == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5])
    by_world = {one["world"]: one["sent_bytes_per_step"]["gradients"] for one in halves}
    parameters = serial[0]["sent_bytes_per_step"]["gradients"] / (2 * 2 * 4 * 1 / 2)
    assert by_world[2] == pytest.approx(4 * parameters)  # to the twin
    assert by_world[8] == pytest.approx((2 * 3 / 4 + 1) * 4 * parameters)  # around a ring of four first
    assert main(["plan", *given, "landscape={method: sampa, halves: true}", "--worlds", "3"]) == 2
    assert "--worlds 3 has no halves" in capsys.readouterr().err


def test_the_tables(capsys):
    assert main(["plan", QUICKSTART, *SMALL, "elastic={max_nodes: 4}", "--gpu-memory", "80 GB"]) == 0
    out = capsys.readouterr().out
    for said in (
        "A step",
        "Memory per rank, in ",
        "activations",
        "peak",
        "Host memory per rank",
        "Fits from 2 ranks on",
    ):
        assert said in out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--worlds", "2,x"], "--worlds 2,x must be numbers of ranks from 1 to 4096"),
        (["--worlds", "0"], "--worlds 0 must be"),
        (["--gpu-memory", "lots"], "--gpu-memory lots must be a size such as 80GiB or 24GB."),
        (["--gpu-memory", "0GiB"], "--gpu-memory 0GiB must be a size"),
        (["--tokens-per-second", "-1"], "--tokens-per-second -1 must be a number > 0."),
        (["--tokens-per-second", "nan"], "--tokens-per-second nan must be a number > 0."),
        (["--price-per-hour", "2"], "--price-per-hour needs --tokens-per-second"),
        (["--worlds", "3", "fsdp_replicas=2"], "fsdp_replicas=2 must divide --worlds 3"),
        (["--worlds", "9", "elastic={max_nodes: 4}"], "--worlds 9 lies outside the job's 2 to 8 workers"),
        (["model.import=nowhere:model", "model.model_type="], "model needs exactly one of"),
        (["model=", "model_name_or_path=./nowhere"], "nowhere"),
        (["elastic={max_nodes: 4, max_accumulation: 1}"], "too small for a global batch of 32"),
    ],
)
def test_a_mistake_is_one_line(capsys, given, says):
    flags = [g for g in given if g.startswith("--") or "=" not in g]
    overrides = [g for g in given if g not in flags]
    assert says in refusal(capsys, QUICKSTART, *overrides, *flags)


def test_code_of_the_jobs_own_is_run_with_trust_only(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_planned.py").write_text(
        "from torch import nn\n\n\ndef model(inputs):\n"
        "    return nn.Sequential(nn.Linear(inputs, 32), nn.Linear(32, 10))\n"
    )
    given = [str(ROOT / "configs/digits.yaml"), "model={import: 'mine_planned:model', args: {inputs: 64}}"]
    assert "--trust" in refusal(capsys, *given)
    assert told(capsys, *given, "--trust")["parameters"] == 64 * 32 + 32 + 32 * 10 + 10


def test_a_model_that_cannot_run_without_numbers_is_planned_without_its_activations(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "looks_planned.py").write_text(
        "from torch import nn\n\n\nclass Looks(nn.Linear):\n    def forward(self, x):\n"
        "        return super().forward(x * float(x.sum().item()))\n\n\ndef model():\n    return Looks(64, 10)\n"
    )
    given = [str(ROOT / "configs/digits.yaml"), "model={import: 'looks_planned:model'}", "--trust"]
    out = told(capsys, *given)
    assert out["activations_unknown"] and "activations" not in out["worlds"][0]["device_bytes"]["in_pass"]
    assert main(["plan", *given]) == 0
    assert "Activations are not counted: the model cannot run without numbers" in capsys.readouterr().out


def test_the_commands_of_the_documentation(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plans = [words for words in commands("docs/plan.md") if words[1] == "plan"]
    assert len(plans) == 4
    for command in plans:
        assert main(command[1:]) == 0, command
