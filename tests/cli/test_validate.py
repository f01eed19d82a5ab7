"""`elastic-lsopt validate` as a user meets it: what it prints, what it refuses, and how."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lsopt.cli.main import main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments: str) -> str:
    assert main(["validate", *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments: str) -> str:
    assert main(["validate", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("elastic-lsopt: ") and printed.err.count("\n") == 1
    return printed.err


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the printed table under a title, by their first column."""
    lines = text[text.index(title) :].splitlines()[2:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    table = {}
    for row in cells:
        if len(row) < 4:
            break
        table[row[0].rstrip("*")] = row[1:]
    return table


@pytest.mark.parametrize("name", ["quickstart", "quickstart-zero3", "digits"])
def test_the_shipped_files_are_right(capsys, name):
    path = str(ROOT / f"configs/{name}.yaml")
    assert run(capsys, path).endswith(f"{path} is right.\n")


@pytest.mark.parametrize(
    ("samples", "unit", "parts"), [(32, 8, 1), (64, 4, 1), (28, 4, 3), (30, 4, 2), (96, 6, 5), (8, 8, 1)]
)
def test_the_batch_arithmetic_is_that_of_dealing_units_out_one_by_one(capsys, samples, unit, parts):
    out = run(
        capsys, QUICKSTART, f"global_batch_size={samples}", f"per_device_train_batch_size={unit}", "workers=7",
        f"landscape={{method: lpf_sgd, parts: {parts}}}",
    )  # fmt: skip
    table = rows(out, "A step:")
    assert list(table) == ["1", "2", "4", "7", "8"]
    units = -(-samples // unit)
    assert f"{samples} samples in {units} micro-batches of {unit}" in out
    assert ("(the last of" in out) == bool(samples % unit)
    for world in map(int, table):
        hands = [[0] * parts for _ in range(world)]
        for u in range(units):
            part = next(p for p in range(parts) if u < units * (p + 1) // parts)
            hands[u % world][part] += 1
        held = sorted({sum(hand) for hand in hands})
        forwards = sum(max(hand[p] for hand in hands) for p in range(parts))
        each = " to ".join(map(str, [held[0], held[-1]][: len(held)]))
        assert table[str(world)] == [each, str(forwards), str(forwards * world - units)]


def test_the_memory_is_that_of_the_model(capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)
    )
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    whole = sum(p.numel() for p in model.parameters())
    shape = ("hidden_size=192", "intermediate_size=512", "num_hidden_layers=4", "num_attention_heads=6")
    overrides = [f"model.{key}" for key in (*shape, "tie_word_embeddings=false")]
    out = run(capsys, QUICKSTART, *overrides, "workers=3")
    assert f"{whole:,} trainable parameters" in out
    table = rows(out, "Memory per rank, in MiB")
    per_world = {
        "weights": 4, "gradient": 4, "optimizer state": 8, "way back of a perturbation": 4,
    }  # fmt: skip
    for what, each in per_world.items():
        assert table[what] == [f"{-(-whole // world) * each / 2**20:,.2f}" for world in (1, 2, 3, 4, 8)]
    gathered = 4 * (whole - sum(layers) + layers[0]) / 2**20
    assert table["gathered weights"] == [f"{gathered:,.2f}"] * 5
    assert "backend fsdp2" in out and "SAM(rho=0.05" in out


def test_a_schedule_of_the_batch_is_cut_at_its_largest(capsys):
    ramp = "batch_schedule={kind: ramp, min_global_batch_size: 16, max_global_batch_size: 64, ramp_samples: 1000}"
    assert "A step: 16 to 64 samples in at most 8 micro-batches of 8" in run(capsys, QUICKSTART, ramp)
    said = refusal(capsys, QUICKSTART, ramp, "landscape={method: lpf_sgd, parts: 4}")
    assert "of a batch of 16 samples" in said and "cannot be cut into 4 part(s)" in said


def test_an_elastic_job_says_what_each_world_runs_and_what_its_mirror_holds(capsys):
    shape = ("hidden_size=64", "intermediate_size=128", "num_hidden_layers=1", "num_attention_heads=2")
    overrides = [f"model.{key}" for key in shape] + ["workers=1", "learning_rate=1e-3", "weight_decay=0"]
    scale = "elastic={policy: scale_batch, reference_workers: 4, max_nodes: 6, max_global_batch_size: 40}"
    out = run(capsys, QUICKSTART, *overrides, scale)
    plans = rows(out, "Elastic: 1 to 6 nodes, scale_batch, lr_rule sqrt")
    assert {world: row[:3] for world, row in plans.items()} == {
        "1": ["8", "1", "0.0005"], "2": ["16", "1", "0.000707"], "4": ["32", "1", "0.001"],
        "6": ["40", "1", "0.00112"],
    }  # fmt: skip
    assert "6 ranks: max_global_batch_size=40 held by fewer micro-batches a worker" in out
    assert plans["1"][3].split(", ") == ["0.975", "0.9998"]
    keep = rows(run(capsys, QUICKSTART, *overrides, "elastic={max_nodes: 8}"), "Elastic: 1 to 8 nodes, keep_batch")
    assert {world: row[:3] for world, row in keep.items()} == {
        world: ["32", forwards, "0.001"] for world, forwards in (("1", "4"), ("2", "2"), ("4", "1"), ("8", "1"))
    }
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    whole = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert f"{whole:,} trainable" in out
    title = out[out.index("Host memory per rank") :].splitlines()[0]
    unit = {"KiB": 2**10, "MiB": 2**20}[title[-3:]]
    mirror = rows(out, "Host memory per rank")
    # The committed version, eight that trail, one being taken; bytes, Adam; what describes a version.
    own = [f"{10 * (4 * 3 * -(-whole // world) + 2**15) / unit:,.2f}" for world in (1, 2, 4, 6)]
    assert mirror["own versions"] == own
    assert mirror["mirrored peers' versions"] == ["0.00", *own[1:]]


def test_worlds_that_the_policy_refuses_have_no_memory(capsys):
    out = run(capsys, QUICKSTART, "workers=1", "elastic={min_nodes: 4, max_nodes: 8, max_accumulation: 1}")
    header = out[out.index("Memory per rank") :].splitlines()[1]
    assert re.findall(r"\d+", header) == ["4", "8"]
    assert "Memory per rank" not in run(capsys, QUICKSTART, "workers=1", "fsdp_replicas=3")


def test_replica_groups_leave_out_the_worlds_that_they_cannot_divide(capsys):
    out = run(capsys, QUICKSTART, "workers=6", "fsdp_replicas=2")
    header = out[out.index("Memory per rank") :].splitlines()[1]
    assert re.findall(r"\d+", header) == ["2", "4", "6", "8"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("landscape.rhoo=0.1", "method 'sam' has no field 'rhoo'; did you mean 'rho'?"),
        ("landscape.rho=-1", "rho=-1 must be a number >= 0"),
        ("landscape.rho=big", "rho='big' must be a valid number"),
        ("landscape.every=1.5", "every=1.5 must be a valid integer"),
        ("landscape.every=true", "every=True must be a valid integer"),
        ("landscape.rho='0.1'", "rho='0.1' must be a valid number"),
        ("landscape.radius=ball", "radius='ball' must be 'model', 'parameter' or 'row'"),
        ("landscape.method=samm", "unknown method 'samm'; did you mean 'sam'?"),
        ("landscape={method: lpf_sgd}", "a step of 4 micro-batch(es) cannot be cut into 8 part(s)"),
        ("dataset=./no.txt", "dataset=./no.txt does not exist"),
        ("resume_from_checkpoint=runs/no", "resume_from_checkpoint=runs/no does not exist"),
        ("output_dir=/dev/null/runs", "output_dir=/dev/null/runs: /dev/null is not a folder"),
        ("model.model_type=lama", "lama"),
        ("model.hidden_sze=3", "hidden_sze"),
        ("per_device_train_batch_size=64", "global_batch_size=32 must be at least per_device_train_batch_size=64"),
        (
            "global_batch_size=100000000000",
            "is 12500000000 micro-batches of per_device_train_batch_size=8, the limit",
        ),
        ("workers=1000000000", "workers=1000000000 processes on one machine are beyond the limit of 4096"),
        ("probes={trace: {}}", "probes.trace needs exactly one of every_steps and every_samples"),
        ("elastic={max_accumulation: 1}", "too small for a global batch of 32"),
        ("elastic={min_nodes: 9, max_nodes: 8}", "min_nodes=9 is above max_nodes=8; raise max_nodes or lower it."),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_place(capsys, override, says):
    message = refusal(capsys, QUICKSTART, override)
    assert says in message
    assert message.startswith("elastic-lsopt: ") and ("command line" in message or f"{QUICKSTART}:" in message)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["landscape={method: momentum_sam}", "optim=sgd", "momentum=0"],
            "MomentumSAM needs a base that keeps momentum",
        ),
        (["landscape={method: sam, precondition: adam}", "optim=sgd"], "SAM needs a base that keeps second moments"),
        (["landscape={method: momentum_sam}", "optim=sophia_h"], None),
        (["landscape={method: momentum_sam}", "optim=adamw"], None),
    ],
    ids=str,
)
def test_a_base_that_lacks_what_the_method_needs(capsys, overrides, says):
    if says is None:
        run(capsys, QUICKSTART, *overrides)
    else:
        assert says in refusal(capsys, QUICKSTART, *overrides)


def test_a_methods_field_names_the_line_of_the_file(capsys, tmp_path):
    text = Path(QUICKSTART).read_text().replace("rho: 0.05", "rhoo: 0.05")
    path = tmp_path / "job.yaml"
    path.write_text(text)
    line = text[: text.index("rhoo")].count("\n") + 1
    assert f"{path}:{line}: method 'sam' has no field 'rhoo'" in refusal(capsys, str(path))


def test_a_model_folder_that_is_not_there(capsys):
    assert "nowhere" in refusal(capsys, QUICKSTART, "model=", "model_name_or_path=./nowhere")


def test_from_a_shell_a_mistake_is_one_line_and_code_2():
    command = [sys.executable, "-m", "elastic_lsopt.cli.main", "validate", "no.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "elastic-lsopt: no.yaml does not exist; give the path of a job's YAML file.\n"


def test_the_schema_is_printed(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "elastic_lsopt/config/pages/schema.json").read_text()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["validate", "--help"]])
def test_what_argparse_answers(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "elastic-lsopt" in capsys.readouterr().out


def test_a_missing_command_is_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err
