"""The training loop on real ranks: the same job at any world size, resumed anywhere, on text and on labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import LLAMA, WORDS, Run, in_ranks, losses, rows, write_job


@pytest.mark.parametrize("world", [1, 3])
def test_the_world_size_changes_no_loss(run: Run, folder: Path, whole: Path, world: int) -> None:
    run(world, write_job(folder / f"world{world}.yaml"))
    assert losses(folder / f"world{world}") == pytest.approx(losses(whole), rel=1e-5)
    assert rows(folder / f"world{world}")[8]["eval_loss"] == pytest.approx(rows(whole)[8]["eval_loss"], rel=1e-5)
    assert {row["world"] for row in rows(folder / f"world{world}").values()} == {world}


@pytest.mark.fast
def test_a_row_of_metrics_says_where_the_run_is(whole: Path) -> None:
    """Seven samples a step in units of 2; warm-up to 0.1 over two of eight steps, then half a cosine over six."""
    found = rows(whole)
    assert [row["samples"] for row in found.values()] == [7 * s for s in range(1, 9)]
    cosine = [0.05 * (1 + float(torch.cos(torch.tensor(torch.pi * k / 6, dtype=torch.float64)))) for k in range(6)]
    assert [row["lr"] for row in found.values()] == pytest.approx([0, 0.05, *cosine])
    assert [s for s, row in found.items() if "eval_loss" in row] == [4, 8]
    assert {(r["generation"], r["batch"], r["world"], r["passes"], r["skipped"]) for r in found.values()} == {
        (0, 7, 2, 2, False)
    }
    assert all(r["seconds"] > 0 and r["gradient_norm"] > 0 for r in found.values())


@pytest.mark.parametrize("batches", [None, 3])
def test_evaluation_in_rounds_is_a_plain_loop_over_the_held_out_samples(
    ranks: Any, folder: Path, batches: int | None
) -> None:
    job = write_job(folder / "evaluation.yaml", eval_batches=batches)
    for ours, plain in in_ranks(ranks, 2, "evaluation", path=str(job)):
        assert ours == pytest.approx(plain, rel=1e-6)


def test_a_run_goes_on_at_another_world_size(run: Run, folder: Path, whole: Path) -> None:
    job = _half(folder, "wider", whole)
    assert run(3, job)["step"] == 8
    _same(rows(folder / "wider"), rows(whole))
    assert [row["world"] for _, row in sorted(rows(folder / "wider").items())] == [2] * 4 + [3] * 4


def test_a_run_goes_on_from_zero3_to_fsdp2(run: Run, folder: Path, whole: Path) -> None:
    zero = {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}
    run(2, write_job(folder / "zero.yaml", **zero))
    assert losses(folder / "zero") == pytest.approx(losses(whole), rel=1e-5)
    job = _half(folder, "from-zero", folder / "zero")
    assert run(3, job)["step"] == 8
    _same(rows(folder / "from-zero"), rows(whole), rel=1e-5)


def test_a_run_that_is_done_trains_no_more(run: Run, folder: Path, whole: Path) -> None:
    job = write_job(folder / "again.yaml")
    shutil.copytree(whole, folder / "again")
    shutil.rmtree(folder / "again" / "model")
    assert run(2, job) == {"step": 8, "eval_loss": None, "stopped": False}
    assert rows(folder / "again") == rows(whole)
    ours, theirs = ((d / "model/model.safetensors").read_bytes() for d in (folder / "again", whole))
    assert ours == theirs


def test_what_the_settings_say_counts_after_a_resume(run: Run, folder: Path, whole: Path) -> None:
    """A weight decay that was changed in the file takes effect, so the losses part after the first step."""
    job = _half(folder, "decay", whole, weight_decay=5.0)
    run(2, job)
    changed, before = rows(folder / "decay"), rows(whole)
    assert changed[5]["loss"] == pytest.approx(before[5]["loss"], rel=1e-6)
    assert abs(changed[8]["loss"] - before[8]["loss"]) > 1e-3


def test_another_seed_is_refused_on_resume(ranks: Any, folder: Path, whole: Path) -> None:
    job = _half(folder, "seed", whole, seed=1)
    for said in in_ranks(ranks, 2, "refused", path=str(job)):
        assert "seed=0" in said
        assert "seed=1" in said
        assert "\n" not in said


def test_a_refused_command_leaves_the_folder_true(ranks: Any, folder: Path, whole: Path) -> None:
    """Its settings and its state are still those of the run whose checkpoints lie there."""
    job = _half(folder, "refused", whole, seed=1, max_steps=12)
    there = {name: (folder / "refused" / name).read_bytes() for name in ("config.yaml", "state.json", "metrics.jsonl")}
    for said in in_ranks(ranks, 2, "refused", path=str(job)):
        assert "seed=1" in said
    assert {name: (folder / "refused" / name).read_bytes() for name in there} == there


def test_a_start_anew_keeps_the_earlier_run(run: Run, folder: Path, whole: Path) -> None:
    job = write_job(folder / "anew.yaml", resume_from_checkpoint="none", max_steps=2)
    shutil.copytree(whole, folder / "anew")
    run(2, job)
    assert sorted(rows(folder / "anew")) == [1, 2]
    assert [p.name for p in (folder / "anew/checkpoints").iterdir()] == ["checkpoint-2"]
    assert rows(folder / "anew/earlier-1") == rows(whole)
    assert {p.name for p in (folder / "anew/earlier-1").iterdir()} == {p.name for p in whole.iterdir()}


def test_epochs_become_steps(run: Run, folder: Path) -> None:
    """992 samples, all of them to train on: a hundredth is 9, one step of 7."""
    job = write_job(folder / "epochs.yaml", max_steps=None, num_train_epochs=0.01, eval_fraction=0.0, export=False)
    assert run(1, job) == {"step": 1, "eval_loss": None, "stopped": False}
    assert not (folder / "epochs/model").exists()


def test_texts_with_labels_and_the_folder_that_comes_out(run: Run, folder: Path) -> None:
    """DDP on two ranks; the exported classifier has, in a plain loop, the held-out loss of the last row."""
    from transformers import AutoModelForSequenceClassification

    from elastic_lsopt.cli.job_file import read_job
    from elastic_lsopt.training.datasets.samples import build_data

    data = folder / "labels.jsonl"
    records = [{"text": " ".join(WORDS[(i * k) % 10] for k in range(1, 4)), "label": WORDS[i % 3]} for i in range(60)]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    job = write_job(
        folder / "labels.yaml", dataset=str(data), task="sequence_classification", model=LLAMA, backend="replicated"
    )
    run(2, job)
    held_out = build_data(read_job(job).config)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "labels/model")
    assert model.config.num_labels == 3
    total = 0.0
    for i in range(len(held_out.eval)):
        batch = held_out.collate([held_out.eval[i]])
        with torch.no_grad():
            total += float(model(**batch).loss)
    assert total / len(held_out.eval) == pytest.approx(rows(folder / "labels")[8]["eval_loss"], rel=1e-5)


def test_a_folder_with_its_tokenizer_is_trained_on(run: Run, folder: Path) -> None:
    """From scratch with a tokenizer folder; the exported folder holds model and tokenizer, and a job starts from it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "[END]"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]").save_pretrained(
        folder / "words"
    )
    run(2, write_job(folder / "scratch.yaml", model=LLAMA, tokenizer_name_or_path=str(folder / "words")))
    first = folder / "scratch/model"
    assert AutoTokenizer.from_pretrained(first)("alpha shard")["input_ids"] == [0, 9]

    run(2, write_job(folder / "tuned.yaml", model=None, model_name_or_path=str(first), learning_rate=0.0))
    assert rows(folder / "tuned")[8]["eval_loss"] == pytest.approx(rows(folder / "scratch")[8]["eval_loss"], rel=1e-6)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (first, folder / "tuned/model"))
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name


def _half(folder: Path, name: str, finished: Path, **changes: Any) -> Path:
    """A job whose run folder is that of a finished one, as it was after four of eight steps."""
    shutil.copytree(finished, folder / name)
    shutil.rmtree(folder / name / "checkpoints/checkpoint-8")
    return write_job(folder / f"{name}.yaml", **changes)


def _same(resumed: dict[int, Any], undisturbed: dict[int, Any], rel: float = 1e-6) -> None:
    assert list(resumed) == list(undisturbed)
    for step, row in undisturbed.items():
        assert resumed[step]["loss"] == pytest.approx(row["loss"], rel=rel), step
        assert resumed[step]["samples"] == row["samples"]
