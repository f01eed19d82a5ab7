"""transformers' initialisation, replayed in ranges: its distribution, and the same values however it is cut."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import elastic_lsopt as lso
from elastic_lsopt.checkpoint.huggingface.drawn_weights import BLOCK, DrawnWeights
from elastic_lsopt.checkpoint.huggingface.lora import AdaptedWeights
from tests.cases.checkpoints.hugging_face import SHAPES, SMALL

pytestmark = pytest.mark.fast
LARGER = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 2100, "num_attention_heads": 2}


def on_meta(model_type: str, **more: Any) -> tuple[Any, Any]:
    shape = CONFIG_MAPPING[model_type](**SMALL | SHAPES.get(model_type, {}) | LARGER | more)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32), shape


def whole(weights: DrawnWeights, name: str, numel: int) -> torch.Tensor:
    out = torch.full((numel,), torch.nan)
    weights.copy_to(out, name, 0)
    return out


@pytest.mark.parametrize("model_type", SHAPES)
def test_each_parameter_has_the_distribution_that_transformers_gives_it(model_type: str) -> None:
    """Kolmogorov and Smirnov's statistic of the two samples, times sqrt(n/2): above 1.95 in one of a thousand cases."""
    model, shape = on_meta(model_type, pad_token_id=3)
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(shape, dtype=torch.float32).named_parameters())
    weights = DrawnWeights(model, seed=7)
    drawn = 0
    for name, value in theirs.items():
        n, mine = value.numel(), whole(weights, name, value.numel())
        flat = value.detach().flatten()
        if flat.std() == 0 or n < 20:
            assert torch.equal(mine, flat), name
            continue
        assert torch.equal(mine == 0, flat == 0), name  # the row of a padding id
        drawn += 1
        places = torch.searchsorted(flat.sort()[0].contiguous(), mine.sort()[0].contiguous()) / n
        assert (places - torch.arange(n) / n).abs().max() * sqrt(n / 2) < 2.5, name
    assert drawn > 5


def test_any_cut_gives_the_same_values_and_any_seed_others() -> None:
    model, _ = on_meta("llama", tie_word_embeddings=True)
    weights, name = DrawnWeights(model, seed=1), "model.embed_tokens.weight"
    n = model.model.embed_tokens.weight.numel()
    assert n > 2 * BLOCK
    all_of_it = whole(weights, name, n)
    for begin, end in ((0, 1), (5, BLOCK), (BLOCK - 1, BLOCK + 1), (BLOCK, n), (n - 1, n), (3, n - 3)):
        part = torch.empty(end - begin)
        weights.copy_to(part, name, begin)
        assert torch.equal(part, all_of_it[begin:end])
    assert torch.equal(whole(weights, "lm_head.weight", n), all_of_it)  # tied
    assert not torch.equal(whole(DrawnWeights(model, seed=2), name, n), all_of_it)
    one, other = (whole(weights, f"model.layers.{i}.mlp.down_proj.weight", 64 * 96) for i in (0, 1))
    assert not torch.equal(one, other) and not torch.equal(one[:999], all_of_it[:999])
    assert whole(weights, name, n).unique().numel() > 0.9 * n  # no block is another's


def test_an_initialisation_that_is_not_element_by_element_is_refused() -> None:
    shape = CONFIG_MAPPING["mamba"](hidden_size=16, num_hidden_layers=1, vocab_size=40)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    with pytest.raises(lso.Unsupported, match=r"the initialisation of \S+A_log by copy_ does not go element by"):
        DrawnWeights(model, 0)


def test_it_leaves_torchs_generator_and_transformers_marks_alone() -> None:
    model, _ = on_meta("llama")
    before = torch.get_rng_state()
    whole(DrawnWeights(model, 0), "lm_head.weight", 2100 * 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(getattr(module, "_is_hf_initialized", False) for module in model.modules())


def test_adapters_begin_as_peft_begins_them() -> None:
    """A is uniform in ±1/sqrt(inputs), B is zero: the model begins where the plain one is (LoRA, section 4.1)."""
    import peft

    model, _ = on_meta("llama")
    settings = peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    plain = DrawnWeights(model, seed=3)
    peft.inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
    weights = AdaptedWeights(model, plain, seed=3)
    for layer, inputs in (("self_attn.q_proj", 64), ("mlp.down_proj", 96)):
        name = f"model.layers.0.{layer}"
        a, b, w, was = torch.empty(8 * inputs), torch.ones(64 * 8), torch.empty(64 * inputs), torch.empty(64 * inputs)
        weights.copy_to(a, f"{name}.lora_A.default.weight", 0)
        weights.copy_to(b, f"{name}.lora_B.default.weight", 0)
        weights.copy_to(w, f"{name}.base_layer.weight", 0)
        plain.copy_to(was, f"{name}.weight", 0)
        assert torch.equal(b, torch.zeros(64 * 8)) and torch.equal(w, was)
        bound = 1 / sqrt(inputs)
        assert a.abs().max() <= bound and a.abs().max() > 0.98 * bound
        assert abs(a.var() * 3 / bound**2 - 1) < 0.2 and abs(a.mean()) < 0.1 * bound
