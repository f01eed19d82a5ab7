"""Ranks with other data are refused before the first step, in one line that names them and what differs."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_lsopt.checkpoint.huggingface.folder_identity import identity_of_folder
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.elastic.worker.same_data import BASE, difference, digest_of, identity_of
from elastic_lsopt.training.datasets.batches import LabelledTexts, TokenBlocks
from elastic_lsopt.training.datasets.encoded import Document, Memory, PartWriter
from elastic_lsopt.training.datasets.samples import Data
from tests.jobs import corpus, write_job

fast = pytest.mark.fast


def identity(part: Any, held_out: Any) -> Any:
    return Data(train=part, eval=held_out, collate=list, classes=("a", "b")).identity


@fast
def test_the_digest_sees_every_byte_and_the_shape() -> None:
    tokens = np.arange(600, dtype=np.uint16)
    digests = {digest_of(tokens), digest_of(tokens.reshape(2, 300)), digest_of(tokens.astype(np.int32))}
    for i in (0, 300, 599):
        other = tokens.copy()
        other[i] += 1
        digests.add(digest_of(other))
    assert len(digests) == 6 and digest_of(tokens) == digest_of(tokens.copy())


@fast
def test_a_jobs_data_is_compared_whole() -> None:
    """One token of one block, one label, the held-out part."""
    blocks = np.arange(60, dtype=np.uint16)
    other = blocks.copy()
    other[17] = 0
    pairs = [(blocks, blocks), (other, blocks), (blocks, other), (blocks[:54], blocks)]
    alone = [identity(TokenBlocks(part, 6), TokenBlocks(held_out, 6)) for part, held_out in pairs]
    assert len({str(i) for i in alone}) == 4
    labelled = [identity(texts(numbers, classes), texts([], classes)) for numbers, classes in LABELLED]
    assert len({str(i) for i in labelled}) == 3


LABELLED = (([0, 1], [0, 1]), ([1, 1], [0, 1]), ([0, 1], [1, 0]))
"""Numbers of classes in the order of their first text, and what each number means."""


def texts(numbers: list[int], classes: list[int]) -> LabelledTexts:
    columns = {"tokens": np.uint16, "ends": np.int64, "labels": np.int32}
    writer = PartWriter(Memory(1 << 20).column, columns)
    for n in numbers:
        writer.append(Document(np.arange(3 + n)), n)
    return LabelledTexts(writer.close(), classes)


class Images:
    """A user's own data set: whatever it gives for a number."""

    def __init__(self, sample: Any, length: int = 100) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return self.sample(i)


KINDS: dict[str, Any] = {
    "tensors": lambda i: (torch.full((2, 3), float(i)), i % 3),
    "bf16": lambda i: torch.full((), float(i), dtype=torch.bfloat16),
    "a dict of arrays and words": lambda i: {"x": np.full(3, i), "words": [f"sample {i}", None]},
    "augmented": lambda i: i + torch.rand(()) + random.random(),
}


@fast
@pytest.mark.parametrize("name", KINDS)
def test_a_users_data_set(name: str) -> None:
    sample, state = KINDS[name], torch.get_rng_state()
    first = identity_of(Images(sample))
    assert first == identity_of(Images(sample)) and first["digest of samples"] is not None
    assert torch.equal(state, torch.get_rng_state())
    assert first != identity_of(Images(sample, 101)) and first != identity_of(Images(lambda i: sample(i + 1)))


@fast
def test_what_has_no_bytes_or_draws_by_itself_is_compared_by_length_alone() -> None:
    own = np.random.default_rng(0)
    for sample in (lambda i: object(), lambda i: own.random()):
        alone = identity_of(Images(sample))
        assert alone == {"samples": 100, "digest of samples": None}
        assert difference([alone, {"samples": 100, "digest of samples": "ab"}]) == ([], "")
        assert difference([alone, identity_of(Images(sample, 99))])[0] == [1]


@fast
def test_streams_are_told_apart_by_their_shards() -> None:
    streams = [ShardStream(names, iter) for names in (["a", "b"], ["a", "c"], ["a", "b", "c"])]
    assert difference([identity_of(s) for s in streams])[0] == [1, 2]


@fast
def test_the_line_names_the_ranks_and_what_differs() -> None:
    whole, other = {"samples": 24, "digest": "ab"}, {"samples": 23, "digest": "cd"}
    assert difference([whole, whole, whole]) == ([], "")
    odd, said = difference([whole, other, whole, other])
    assert odd == [1, 3]
    assert "data of ranks 1, 3 is not that of rank 0 (samples: 23 there, 24 on rank 0)" in said and "\n" not in said
    odd, said = difference([whole, other, other], reference=2)
    assert odd == [0] and "rank 0 is not that of rank 2 (samples: 24 there, 23 on rank 2)" in said


@pytest.mark.parametrize("change", ["a document less", "one letter"])
def test_a_plain_job_is_refused_on_every_rank(ranks: Any, tmp_path: Path, change: str) -> None:
    """A file of a node's own: of another length, or of the same length and other content."""
    one, two = corpus(tmp_path / "one"), corpus(tmp_path / "two")
    document = two / "d03.txt"
    if change == "one letter":
        document.write_text("X" + document.read_text()[1:])
    else:
        document.unlink()
    job = write_job(tmp_path / "run.yaml", dataset=str(one))
    said = ranks(2).run("tests.cases.elastic.same_data:job", path=str(job), places=[str(one), str(two)])
    expected = "digest of the training part: " if change == "one letter" else "training samples: "
    assert said[0] == said[1] and f"data of rank 1 is not that of rank 0 ({expected}" in said[0], said
    assert "\n" not in said[0] and not (tmp_path / "run" / "metrics.jsonl").exists()


def llama_folder(path: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(path, max_shard_size="8KB")
    return path


def test_a_folders_identity_sees_each_tensor(tmp_path: Path) -> None:
    """Of files of one length: other values of a single tensor, and a config that says another thing."""
    one = llama_folder(tmp_path / "one", 0)
    same = identity_of_folder(shutil.copytree(one, tmp_path / "same"))
    assert same == identity_of_folder(one) and len(same) > 3 and "config.json" in same
    changed = shutil.copytree(one, tmp_path / "changed")
    name = next(n for n in same if n != "config.json")
    tensors = load_file(changed / name)
    key = next(k for k, t in tensors.items() if t.dim() == 2)
    save_file(tensors | {key: tensors[key] * 1.01}, changed / name, metadata={"format": "pt"})
    odd = {n for n, told in identity_of_folder(changed).items() if told != same[n]}
    assert odd == {name} and (one / name).stat().st_size == (changed / name).stat().st_size
    config = one / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert {n for n, told in identity_of_folder(one).items() if told != same[n]} == {"config.json"}


def test_a_base_of_a_nodes_own_is_refused_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    """Two folders of one name and shape, and adapters on them."""
    folders = [llama_folder(tmp_path / str(seed) / "base", seed) for seed in (0, 1)]
    job = write_job(tmp_path / "run.yaml", model_name_or_path=str(folders[0]), lora={"r": 2}, model=None)
    case = "tests.cases.elastic.same_data:job"
    said = ranks(2).run(case, path=str(job), places=[str(f) for f in folders], key="model_name_or_path")
    assert said[0] == said[1] and "\n" not in said[0], said
    told = r"\d+ bytes, digest \w{16}"
    line = (
        rf"the base model of rank 1 is not that of rank 0 \(model-00001-of-\d+.safetensors: {told} there, {told} on "
        r"rank 0\); give every node the same files."
    )
    assert re.fullmatch(line, said[0]), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@fast
def test_the_line_names_the_nodes_where_there_are_several() -> None:
    base = {"samples": 3, f"{BASE}config.json": "ab"}
    everyones = [base, base | {f"{BASE}config.json": "cd"}, {"samples": 3}]
    assert difference(everyones, nodes=["a", "b", "c"])[1] == (
        "the base model of ranks 1 on b, 2 on c is not that of rank 0 on a (config.json: cd there, ab on rank 0); give "
        "every node the same files."
    )
    assert "ranks 1, 2 is" in difference(everyones, nodes=["a", "a", "a"])[1]
    assert "config.json: missing there, ab on rank 0" in difference([base, {"samples": 3}])[1]


def test_in_an_elastic_job_the_newcomer_is_refused_and_the_others_go_on(ranks: Any) -> None:
    """A job with two other lengths does not begin; one that has begun goes on with those who hold its data."""
    generations = [[5, 5, 4], [-5, -5, -5], [5, -4, 5], [5, -5, -4], [5, 5, -5]]
    heard = ranks(3).run("tests.cases.elastic.same_data:joined", lengths=generations)
    first = "UserError: the training data of rank 2 is not that of rank 0 (samples: 4 there, 5 on rank 0)"
    assert all(h[0].startswith(first) for h in heard), heard
    assert [h[1] for h in heard] == ["agreed"] * 3
    kinds = [[h[g].partition(":")[0] for h in heard] for g in (2, 3, 4)]
    assert kinds == [["PeerFailed", "UserError", "PeerFailed"], ["PeerFailed", "PeerFailed", "UserError"],
                     ["agreed"] * 3]  # fmt: skip
    assert "data of rank 1 is not that of rank 0" in heard[0][2]
