"""The files of a folder, range by range: every value where transformers has it, and what is wrong in one line."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

import elastic_lsopt as lso
from elastic_lsopt.checkpoint.huggingface.drawn_weights import DrawnWeights
from elastic_lsopt.checkpoint.huggingface.folder_weights import FolderWeights
from tests.cases.checkpoints.hugging_face import SHAPES, SMALL

pytestmark = pytest.mark.fast


def shape_of(model_type: str, **more: Any) -> Any:
    return CONFIG_MAPPING[model_type](**SMALL | SHAPES[model_type] | more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several files; its tests copy the folder before they spoil it."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape_of("llama")).save_pretrained(folder, max_shard_size="20kB")
    return folder


def on_meta(shape: Any, kind: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta"):
        return kind.from_config(shape, dtype=torch.float32)


def weights_of(folder: Path, shape: Any, kind: Any = AutoModelForCausalLM) -> tuple[FolderWeights, Any]:
    model = on_meta(shape, kind)
    return FolderWeights(folder, model, missing=lambda: DrawnWeights(model, 0)), model


@pytest.mark.parametrize("model_type", [*SHAPES, "olmoe", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_range_is_what_transformers_reads(tmp_path: Path, model_type: str, dtype: str) -> None:
    torch.manual_seed(0)
    more = {"olmoe": {"num_experts": 4, "num_experts_per_tok": 2}}.get(model_type, {})
    shape = CONFIG_MAPPING[model_type](**SMALL | SHAPES.get(model_type, {"intermediate_size": 24}) | more)
    AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype)).save_pretrained(
        tmp_path, max_shard_size="20kB"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    weights, model = weights_of(tmp_path, shape)
    assert not weights.unused and not weights.newly_drawn
    for name, p in model.named_parameters():
        cuts = sorted({0, 1, p.numel() // 3, p.numel() // 2 + 1, p.numel()})
        for begin, end in pairwise(cuts):
            part = torch.full((end - begin,), torch.nan)
            weights.copy_to(part, name, begin)
            assert torch.equal(part, theirs[name].flatten()[begin:end]), (name, begin)


def test_experts_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range of a fused parameter touches the files of its own experts."""
    shape = shape_of("mixtral")
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    weights, _ = weights_of(tmp_path, shape)
    read: list[int] = []
    monkeypatch.setattr(weights, "_read", lambda target, stored, first: read.append(target.numel()))
    weights.copy_to(torch.empty(10), "model.layers.0.mlp.experts.gate_up_proj", 3)
    assert read == [10]


def test_a_base_models_folder_and_a_new_head(tmp_path: Path) -> None:
    """Saved as a bare BERT, read as a classifier: the names lack their prefix, the head is drawn from the seed."""
    from transformers import BertModel

    shape = shape_of("bert")
    torch.manual_seed(0)
    BertModel(shape, add_pooling_layer=False).save_pretrained(tmp_path)
    weights, _ = weights_of(tmp_path, shape, AutoModelForSequenceClassification)
    assert sorted(weights.newly_drawn) == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
    ]  # fmt: skip
    part = torch.empty(16)
    weights.copy_to(part, "bert.embeddings.word_embeddings.weight", 16)
    wanted = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(part, wanted[1])
    head = torch.empty(32)
    weights.copy_to(head, "classifier.weight", 0)
    assert 0.01 < head.std() < 0.04


def test_tied_weights_under_either_name_and_untied_where_the_files_say_so(tmp_path: Path) -> None:
    shape = shape_of("llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]

    def read(**changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        save_file({k.replace("HEAD", "lm_head.weight"): v for k, v in changed.items()}, file, {"format": "pt"})
        weights, model = weights_of(tmp_path, shape)
        head, embedding = torch.empty(table.numel()), torch.empty(table.numel())
        weights.copy_to(head, "lm_head.weight", 0)
        weights.copy_to(embedding, "model.embed_tokens.weight", 0)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
        assert torch.equal(head.view_as(table), theirs.lm_head.weight)
        assert torch.equal(embedding.view_as(table), theirs.model.embed_tokens.weight)
        return head, embedding

    rest = {k: v for k, v in tensors.items() if k != "model.embed_tokens.weight"}
    assert torch.equal(*read(**tensors))
    assert torch.equal(*read(**rest, HEAD=table))
    assert torch.equal(*read(**tensors, HEAD=table.clone()))
    assert not torch.equal(*read(**tensors, HEAD=table + 1))


def spoil_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def lead_out(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])


def other_names(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({k.replace("layers", "h"): v for k, v in load_file(file).items()}, file, {"format": "pt"})


def other_shape(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.ones(17)
        save_file(tensors, file, {"format": "pt"})


def integers(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.int8) for k, v in load_file(file).items()}, file, {"format": "pt"})


def eight_bits(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_index, r"model.safetensors.index.json is broken: it holds no weight_map; copy the folder again"),
        (lead_out, r"names \.\./secret.safetensors, which is not there; copy the folder again"),
        (lose_a_file, r"is not whole: .* names model-00002-of-\d+.safetensors, which is not there"),
        (cut_a_file, r"model-00002-of-\d+.safetensors is broken: .*; copy it again"),
        (other_names, r"no weights for model.layers.0.\S+ and \d+ more of LlamaForCausalLM: it is of another architec"),
        (other_shape, r"model.norm.weight has shape \[17\] in the files and \[16\] in the model"),
        (integers, r"is of type I8, which is quantised; give the weights in bf16, fp16 or fp32"),
        (eight_bits, r"is of type F8_E4M3, which is quantised; give the weights in bf16, fp16 or fp32"),
    ],
)
def test_a_spoilt_folder_is_one_line(saved: Path, tmp_path: Path, spoil: Any, says: str) -> None:
    shutil.copytree(saved, tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(lso.UserError, match=says) as caught:
        weights_of(tmp_path / "m", shape_of("llama"))
    assert "\n" not in str(caught.value)
