"""Models: the three ways to name one, the same weights on every rank, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from elastic_lsopt.checkpoint.huggingface.weights import WholeWeights
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.training.building.models import (
    apply_activation_checkpointing,
    blocks,
    build_model,
    shape_and_weights,
)

pytestmark = pytest.mark.fast
LLAMA = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = LLAMA | {"model_type": "bert"}
MLP = {"import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 8, "classes": 10}}


def settings(model: dict[str, Any] | None = None, **given: Any) -> TrainConfig:
    return TrainConfig(dataset="text.txt", output_dir="out", max_steps=1, model=model, **given)


def saved(folder: Path, **given: Any) -> str:
    build_model(settings(LLAMA, **given)).save_pretrained(folder)
    return str(folder)


def test_from_scratch_fills_in_what_the_file_leaves_out() -> None:
    model = build_model(settings(LLAMA, block_size=4096))
    shape = model.config
    assert isinstance(model, LlamaForCausalLM) and model.training
    assert shape.vocab_size == 257 and shape.eos_token_id == 256 and shape.pad_token_id is None
    assert shape.intermediate_size == 128  # 8/3 of 48, in steps of 64
    assert shape.num_key_value_heads == 4 and shape.max_position_embeddings == 4096
    assert shape._attn_implementation == "sdpa" and shape.use_cache is False
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # By hand: embedding and head, then a layer's four square projections, three of the MLP and two norms, and a norm.
    assert sum(p.numel() for p in model.parameters()) == 2 * 257 * 48 + 3 * (4 * 48**2 + 3 * 48 * 128 + 96) + 48


def test_what_the_file_says_stands() -> None:
    given = LLAMA | {"intermediate_size": 80, "num_key_value_heads": 2, "vocab_size": 300, "eos_token_id": 7}
    shape = build_model(settings(given)).config
    assert {key: getattr(shape, key) for key in given} == given
    eager = build_model(settings(LLAMA, attn_implementation="eager"))
    assert eager.config._attn_implementation == "eager"
    gpt2 = build_model(settings({"model_type": "gpt2", "hidden_size": 48, "n_head": 4, "n_layer": 2}))
    assert gpt2.transformer.wte.weight.shape == (257, 48)


def test_it_trains_on_every_token_of_the_vocabulary() -> None:
    model = build_model(settings(LLAMA))
    ids = torch.arange(257)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert (model.model.embed_tokens.weight.grad.norm(dim=1)[:-1] > 0).all()
    ids = ids.flip(1)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[256].norm() > 0


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(settings(LLAMA, seed=3)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (build_model(settings(LLAMA, seed=s)).state_dict() for s in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("model", [LLAMA, BERT, MLP], ids=["llama", "bert", "mlp"])
def test_meta_has_the_shapes_and_no_memory(model: dict[str, Any]) -> None:
    config = settings(model)
    meta, real = build_model(config, device="meta"), build_model(config)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert [(n, p.shape) for n, p in meta.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]


def test_a_folder_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", seed=5)
    model = build_model(settings(model_name_or_path=folder))
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())
    assert model.training and model.config.use_cache is False
    meta = build_model(settings(model_name_or_path=folder), device="meta")
    assert meta.model.embed_tokens.weight.shape == (257, 48)


def test_half_precision_weights_become_fp32_masters(tmp_path: Path) -> None:
    build_model(settings(LLAMA)).bfloat16().save_pretrained(tmp_path)
    model = build_model(settings(model_name_or_path=str(tmp_path)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape", [LLAMA, BERT], ids=["llama", "bert"])
def test_sequence_classification(shape: dict[str, Any], tmp_path: Path) -> None:
    config = settings(shape, task="sequence_classification")
    model = build_model(config, classes=5).eval()
    ids = torch.tensor([[1, 2, 3], [4, 256, 256]])
    mask = (ids != 256).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[1:, :1], attention_mask=mask[1:, :1]).logits
    assert logits.shape == (2, 5) and torch.allclose(logits[1], alone[0], atol=1e-6)

    model.save_pretrained(tmp_path)
    again = build_model(settings(model_name_or_path=str(tmp_path), task="sequence_classification"), classes=5)
    assert torch.equal(again.score.weight if shape is LLAMA else again.classifier.weight, _head(model))
    assert type(again) is type(AutoModelForSequenceClassification.from_pretrained(tmp_path))


def _head(model: Any) -> torch.Tensor:
    return model.score.weight if hasattr(model, "score") else model.classifier.weight


def test_a_new_head_on_a_folder_is_drawn_from_the_seed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    new = {"model_name_or_path": folder, "task": "sequence_classification"}
    heads = [_head(build_model(settings(**new, seed=s), classes=3)) for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


class Block(nn.Module):
    """A residual layer with dropout and a list of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.experts[1](self.experts[0](x).relu()))


class Tower(nn.Module):
    """Three blocks between two layers; `calls` counts what enters the first."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.mixed = nn.ModuleList([nn.Linear(width, width), nn.ReLU()])
        self.calls = 0
        self.layers[0].experts[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_blocks_are_the_outermost_list_of_one_class() -> None:
    llama, tower = build_model(settings(LLAMA)), Tower()
    assert blocks(llama) == list(llama.model.layers) and len(blocks(llama)) == 3
    bert = build_model(settings(BERT))
    assert blocks(bert) == list(bert.bert.encoder.layer)
    assert blocks(tower) == list(tower.layers)
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_checkpointing_recomputes_and_changes_no_number_and_no_name() -> None:
    plain, saving = Tower(), Tower()
    saving.load_state_dict(plain.state_dict())
    apply_activation_checkpointing(saving)
    x = torch.randn(5, 3)
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).sum().backward()
    assert (plain.calls, saving.calls) == (1, 2)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in saving.named_parameters()]
    for a, b in zip(blocks(plain), blocks(saving), strict=True):
        assert torch.equal(a.experts[0].weight.grad, b.experts[0].weight.grad)
    assert plain.state_dict().keys() == saving.state_dict().keys()


def test_checkpointing_a_transformer() -> None:
    model = build_model(settings(LLAMA))
    ids = torch.arange(32).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    calls: list[int] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    apply_activation_checkpointing(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))
    with pytest.raises(UserError, match="ModuleList"):
        apply_activation_checkpointing(nn.Linear(2, 2))


def not_a_module() -> int:
    return 3


@pytest.mark.long
def test_mistakes_are_one_line_that_names_its_key(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", block_size=2048)
    (tmp_path / "empty").mkdir()
    torn = Path(saved(tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"torn")
    pickled = Path(saved(tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"model": {"model_type": "lama"}}, "model.model_type", "did you mean 'llama'"),
        ({"model": {"model_type": "t5"}}, "model.model_type", "t5"),
        ({"model": LLAMA | {"hidden_siz": 3}}, "model.hidden_siz", "did you mean 'hidden_size'"),
        ({"model": LLAMA | {"hidden_size": "x"}}, "model", "expected int"),
        ({"model": LLAMA | {"hidden_size": 50}}, "model", "multiple of the number of attention heads"),
        ({"model": LLAMA | {"vocab_size": 100}}, "model.vocab_size", "100 token ids but the tokenizer has 257"),
        ({"model": LLAMA | {"max_position_embeddings": 64}}, "block_size", "max_position_embeddings=64"),
        ({"model": LLAMA, "attn_implementation": "flah"}, "model.model_type", "flah"),
        ({"model": LLAMA | {"attn_implementation": "sdpa"}}, "model.attn_implementation", "stands beside model"),
        ({"model_name_or_path": "./nope"}, "model_name_or_path", "does not exist"),
        ({"model_name_or_path": str(tmp_path / "empty")}, "model_name_or_path", "empty"),
        ({"model_name_or_path": str(torn)}, "model_name_or_path", "is broken: .*copy it again"),
        ({"model_name_or_path": str(pickled)}, "model_name_or_path", "safetensors"),
        ({"model_name_or_path": folder, "block_size": 4096}, "block_size", "max_position_embeddings=2048"),
        ({"model": {"import": "no.such:thing"}}, "model.import", "No module named 'no'"),
        ({"model": {"import": f"{__name__}:nothing"}}, "model.import", "nothing"),
        ({"model": {"import": f"{__name__}:not_a_module"}}, "model.import", "returned a int"),
        ({"model": MLP | {"args": {"inpts": 3}}}, "model.args", r"mlp\(inputs"),
    ]
    for given, key, message in wrong:
        with pytest.raises(SettingError, match=message) as caught:
            build_model(settings(**given))
        assert caught.value.key == key and "\n" not in str(caught.value), given


def test_a_folder_of_words_is_not_trained_on_bytes(tmp_path: Path) -> None:
    build_model(settings(LLAMA), vocabulary_size=999).save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="999 token ids but the tokenizer has 257; give the model's own"):
        build_model(settings(model_name_or_path=str(tmp_path)))


MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}


def test_what_cannot_be_drawn_in_ranges_is_drawn_whole_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="elastic_lsopt"):
        model, weights = shape_and_weights(settings(MAMBA, seed=3))
    [line] = [r.getMessage() for r in caplog.records if r.name == "elastic_lsopt"]
    assert "A_log by copy_ does not go element by element: each rank builds the whole MambaForCausalLM" in line
    assert isinstance(weights, WholeWeights) and all(p.is_meta for p in model.parameters())
    built = build_model(settings(MAMBA, seed=3))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(built(input_ids=ids).logits).all()
    wanted = torch.log(torch.arange(1, 17, dtype=torch.float32)).expand(32, -1)
    assert torch.allclose(built.backbone.layers[0].mixer.A_log, wanted)


def test_the_folders_way_to_generate_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.generation_config.update(temperature=0.7, do_sample=True, top_k=11)
    plain.save_pretrained(folder)
    told = build_model(settings(model_name_or_path=folder)).generation_config
    assert (told.temperature, told.top_k) == (0.7, 11)
