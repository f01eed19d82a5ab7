"""`elastic-lsopt probe` of a checkpoint, a run and a Hugging Face folder, on one worker and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.cli.main import main
from elastic_lsopt.training.datasets.samples import build_data
from tests.jobs import BIN, LLAMA, command, run, write_job
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import run as forked

MEASURES = ["--measures", "lambda_max,trace,lpf", "--set", "trace.samples=3", "--set", "lpf.draws=2", "--units", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    averages = {"lawa": {"k": 2, "every_samples": 14}}  # of the ends of steps 2 and 4, where checkpoints are too
    job = write_job(folder / "run.yaml", model=LLAMA, max_steps=4, eval_steps=None, save_steps=2, averages=averages)
    run(command("none", job), folder)
    return folder


def probe(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / f"out-{len(list(folder.iterdir()))}"
    said = run([str(BIN / "elastic-lsopt"), "probe", *arguments, "--output", str(out)], folder)
    assert "lambda_max" in said and f"written to {out}/probe-1/probes.json" in said, said
    return json.loads((out / "probe-1" / "probes.json").read_text())


def values(told: dict[str, Any]) -> list[float]:
    found = told["probes"]
    return [told["loss"], found["lambda_max"]["eigenvalues"][0], found["trace"]["value"], found["lpf"]["value"]]


def test_a_run_on_one_worker_and_two(trained: Path) -> None:
    one = probe(trained, str(trained / "run"), *MEASURES)
    two = probe(trained, str(trained / "run" / "checkpoints" / "checkpoint-4"), *MEASURES, "--workers", "2")
    assert one["model"] == two["model"] and one["workers"], two["workers"] == (1, 2)
    assert values(two) == pytest.approx(values(one), rel=1e-3)
    assert one["samples"] == 6 and one["failed"] == {}


def test_the_saved_model_is_the_checkpoint(trained: Path) -> None:
    """And its loss is what transformers computes on the same blocks of text."""
    arguments = ["--data", str(trained / "text"), "--block-size", "16", "--batch-size", "2"]
    saved = probe(trained, str(trained / "run" / "model"), *MEASURES, *arguments)
    ours = probe(trained, str(trained / "run"), *MEASURES)
    assert saved["parameters"] == ours["parameters"]
    assert saved["loss"] == pytest.approx(ours["loss"], rel=0.1)  # other samples are held out, and others drawn

    from transformers import AutoModelForCausalLM

    from elastic_lsopt.training.probing.during_training import fixed_microbatches
    from elastic_lsopt.training.probing.finished_model import Question, settings_of
    from elastic_lsopt.training.processes import World

    question = Question(
        model=trained / "run" / "model", measures={}, output=trained, data=str(trained / "text"), units=3, batch_size=2,
        block_size=16,
    )  # fmt: skip
    config, checkpoint = settings_of(question, 1)
    assert checkpoint is None
    units, _ = fixed_microbatches(build_data(config), config, World(0, 1, torch.device("cpu"), None), 3)  # type: ignore[arg-type]
    ids = torch.cat([u.batch["input_ids"] for u in units])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(trained / "run" / "model")(input_ids=ids, labels=ids).loss
    assert saved["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_the_way_between_two_checkpoints(trained: Path) -> None:
    """Its ends are the two models' own losses, on one worker and on two; its middle is the average of the two."""
    checkpoints = trained / "run" / "checkpoints"
    given = [str(checkpoints / "checkpoint-4"), "--measures", "lambda_max,mode_connectivity", "--units", "3"]
    given += ["--set", "mode_connectivity.points=5", "--other", str(checkpoints / "checkpoint-2")]
    one, two = probe(trained, *given), probe(trained, *given, "--workers", "2")
    path = one["probes"]["mode_connectivity"]
    assert path["losses"] == pytest.approx(two["probes"]["mode_connectivity"]["losses"], rel=1e-5)
    first = probe(trained, str(checkpoints / "checkpoint-2"), "--measures", "lambda_max", "--units", "3")
    assert [path["losses"][0], path["losses"][-1]] == pytest.approx([first["loss"], one["loss"]], rel=1e-6)
    mean = probe(trained, str(trained / "run"), "--measures", "lambda_max", "--units", "3", "--average", "lawa")
    assert mean["average"] == "lawa" and mean["loss"] == pytest.approx(path["losses"][2], rel=1e-5)
    assert mean["probes"]["lambda_max"]["eigenvalues"] != one["probes"]["lambda_max"]["eigenvalues"]


def test_into_the_run_a_folder_each(trained: Path, tmp_path: Path, capsys: Any) -> None:
    """Also of a checkpoint and of the exported model; no answer takes another's place, and the report shows all."""
    whole = tmp_path / "run"
    shutil.copytree(trained / "run", whole)
    cheap = ["--measures", "weight_norm,gradient_norm", "--units", "2"]
    start = [str(BIN / "elastic-lsopt"), "probe"]
    first = run([*start, str(whole), *cheap], tmp_path)
    answer = (whole / "probes" / "probe-1" / "probes.json").read_bytes()
    assert f"written to {whole}/probes/probe-1/probes.json; elastic-lsopt report {whole} draws it." in first
    of_two = ["--workers", "2", "--measures", "weight_norm,gradient_norm,ritz_dimension"]
    run([*start, str(whole / "checkpoints" / "checkpoint-2"), *cheap, *of_two], tmp_path)
    run([*start, str(whole / "model"), *cheap, "--data", str(trained / "text"), "--block-size", "16"], tmp_path)
    assert (whole / "probes" / "probe-1" / "probes.json").read_bytes() == answer
    told = [json.loads((whole / "probes" / f"probe-{n}" / "probes.json").read_text()) for n in (1, 2, 3)]
    assert [answer["step"] for answer in told] == [4, 2, None]

    assert main(["report", str(whole)]) == 0
    page = (whole / "report.html").read_text()
    places = [page.index(f"<h2>probe-{n} of {of}</h2>") for n, of in ((3, "model"), (2, "checkpoint-2"), (1, "check"
              "point-4"))]  # fmt: skip
    assert places == sorted(places)
    for answer in told:
        assert answer["when"] in page
        assert repr(answer["probes"]["weight_norm"]["value"]) in page


@pytest.mark.full  # torchrun starts a job each day, in tests/cli/test_launchers.py
def test_under_torchrun(trained: Path) -> None:
    out = trained / "torchrun"
    start = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "elastic_lsopt", "probe"]
    run([*start, str(trained / "run"), *MEASURES, "--output", str(out)], trained)
    assert json.loads((out / "probe-1" / "probes.json").read_text())["workers"] == 2


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["no/such"], "no/such does not exist; give runs/NAME"),
        (["RUN", "--measures", "lambda_mx"], "unknown measure 'lambda_mx'; did you mean 'lambda_max'?"),
        (["RUN", "--measures", "trace", "--set", "trace.sample=1"], "no setting 'sample'; did you mean 'samples'?"),
        (["RUN", "--set", "lpf=1"], "must read MEASURE.KEY=VALUE"),
        (["RUN", "--measures", ","], "--measures is empty"),
        (["RUN", "--units", "0"], "--units 0 must be >= 1"),
        (["RUN", "--measures", "mode_connectivity", "--other", "no/such"], "no/such does not exist"),
        (["RUN/model"], "is a Hugging Face folder, which names no data; give --data"),
        (["RUN/.."], "is no checkpoint, run folder or Hugging Face folder"),
        (["RUN", "--average", "ema"], "--average ema was not kept by"),
        (["RUN/model", "--average", "lawa"], "which holds no average"),
        (["RUN", "--products", "fast"], "products='fast' is unknown; use one of auto"),
        (["RUN", "--units", "100000"], "are more than the"),
    ],
)
def test_wrong_input_is_one_line(trained: Path, arguments: list[str], says: str) -> None:
    given = [a.replace("RUN", str(trained / "run")) for a in arguments]
    done = forked(
        [str(BIN / "elastic-lsopt"), "probe", *given, "--output", str(trained / "wrong")], cwd=ROOT,
        env=rank_environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(trained.glob("wrong/*"))  # no folder is left without an answer in it


def test_a_checkpoint_of_another_architecture(trained: Path, tmp_path: Path, capsys: Any) -> None:
    """The run's own settings say another width than its checkpoint: the first parameter that differs is named."""
    for part in ("config.yaml", "checkpoints"):
        (tmp_path / part).symlink_to(trained / "run" / part) if part == "checkpoints" else None
    text = (trained / "run" / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: 32")
    (tmp_path / "config.yaml").write_text(text)
    done = forked(
        [str(BIN / "elastic-lsopt"), "probe", str(tmp_path), "--output", str(tmp_path / "out")], cwd=ROOT,
        env=rank_environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "another model: parameter model.embed_tokens.weight" in done.stderr


@pytest.mark.fast
def test_help_names_it(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    assert "--measures" in capsys.readouterr().out


def test_the_trainers_callback(tmp_path: Path) -> None:
    """Its numbers are those of `attach` on the model that the Trainer leaves, and training is not changed by it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    start: list[torch.Tensor] = []

    def trained_by(callbacks: list[Any]) -> Any:
        torch.manual_seed(0)
        shape = LlamaConfig(vocab_size=32, num_hidden_layers=1, hidden_size=16, num_attention_heads=2,
                            intermediate_size=32, use_cache=False)  # fmt: skip
        model = LlamaForCausalLM(shape)
        start[:] = [p.detach().double().clone() for p in model.parameters()]
        rows = [{"input_ids": x, "labels": x} for x in torch.randint(0, 32, (16, 8))]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"t{len(callbacks)}"), max_steps=4, per_device_train_batch_size=4, report_to=[],
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
            lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()  # type: ignore[arg-type]
        return model

    x = torch.arange(16).view(2, 8)
    batches = [{"input_ids": x, "labels": x}, {"input_ids": x + 3, "labels": x + 3}]
    callback = lso.ProbeCallback(
        {
            "lambda_max": {"tolerance": 1e-4}, "noise_scale": {}, "edge_of_stability": {}, "distance_from_start": {},
            "pac_bayes": {"draws": 2},
        },
        batches=batches, every_steps=2,
    )  # fmt: skip
    model, plain = trained_by([callback]), trained_by([])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [row["step"] for row in callback.results] == [2, 4]
    space, oracle = lso.attach(model.eval(), None, batches)
    wanted = lso.probes.lanczos(space, oracle, k=1, tolerance=1e-4).eigenvalues[0]
    assert callback.results[1]["probes"]["lambda_max"]["eigenvalues"][0] == pytest.approx(wanted, rel=1e-3)
    far = sum(float((p.detach().double() - s).square().sum()) for p, s in zip(model.parameters(), start, strict=True))
    assert callback.results[1]["probes"]["distance_from_start"]["value"] ** 2 == pytest.approx(far, rel=1e-5)
    assert callback.results[1]["probes"]["pac_bayes"]["square_distance"] == pytest.approx(far, rel=1e-5)
    lines = (tmp_path / "t1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert all(row["probes"][name] is not None for row in callback.results for name in callback.measures)
    for wrong, says in (
        ({"measures": {"trce": {}}, "batches": batches, "every_steps": 1}, "did you mean 'trace'"),
        ({"measures": {"trace": {}}, "batches": [], "every_steps": 1}, "batches is empty"),
        ({"measures": {"trace": {}}, "batches": batches, "every_steps": 0}, "every_steps=0 must be >= 1"),
    ):
        with pytest.raises(lso.UserError, match=says):
            lso.ProbeCallback(**wrong)


class Constant(torch.autograd.Function):
    """tanh with a backward pass that is a constant to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        [x] = ctx.saved_tensors
        with torch.no_grad():
            return g * (1 - torch.tanh(x.detach()) ** 2)


class Hidden(torch.nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](Constant.apply(self[0](x)))


def test_a_fallback_is_remembered() -> None:
    """The checks run once; what they settled holds at the next measurement too, whose exact products would be wrong."""
    torch.manual_seed(0)
    model = Hidden(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    callback = lso.ProbeCallback(
        {"lambda_max": {"tolerance": 1e-4}}, batches=batches, every_steps=1,
        loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )  # fmt: skip
    first, second = (callback._measured(model, None, step)["lambda_max"] for step in (1, 2))
    assert first["relative_error"] is not None and second["relative_error"] is not None
    assert second["eigenvalues"] == pytest.approx(first["eigenvalues"], rel=1e-2)
