"""Bytes counted without storage against closed forms, against what autograd really saves, and against the allocator."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan_memory import FLAT, LORA, job
from elastic_lsopt.oracle.losses.loss import causal_lm_loss
from elastic_lsopt.training.building.models import apply_activation_checkpointing, blocks
from elastic_lsopt.training.estimate.activations import Pass, run_without_storage
from elastic_lsopt.training.estimate.look import look_at_model
from elastic_lsopt.training.estimate.repeated import few_of, with_more_blocks

full = pytest.mark.full
B, S, H, A, V = 3, 32, 64, 4, 97
SHAPES = {name: ((B, S), torch.int64) for name in ("input_ids", "labels")}


def llama(layers: int, attention: str = "sdpa", device: str = "meta") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=A,
        max_position_embeddings=S, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def gpt2(layers: int, device: str = "meta", dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_embd=H, n_head=A, n_layer=layers, n_positions=S, use_cache=False, activation_function="gelu",
        attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, attn_implementation="eager",
    )  # fmt: skip
    with torch.device(device):
        return GPT2LMHeadModel(config).train()


def counted(model: nn.Module, dtype: torch.dtype = torch.float32) -> Pass:
    return run_without_storage(model, causal_lm_loss(), SHAPES, blocks(model), dtype=dtype)


def per_block(make: Any, **how: Any) -> int:
    """What one block more leaves for the backward."""
    return counted(make(3), **how).saved - counted(make(2), **how).saved


@pytest.mark.fast
def test_a_gpt2_block_is_the_formula_of_the_paper():
    # Korthikanti et al. 2022, section 4.1, without dropout: its masks (2 s b h and a s^2 b) and its copy of the
    # attention (2 a s^2 b) are not there. Layer norms keep a mean and a deviation per token beside.
    formula = S * B * H * (34 - 2) + (5 - 3) * A * S * S * B
    own = per_block(gpt2, dtype=torch.bfloat16)
    assert formula <= own <= formula + 2 * 2 * 4 * S * B


def test_checkpointed_blocks_leave_their_input_alone():
    def checkpointed(layers: int) -> nn.Module:
        model = llama(layers)
        apply_activation_checkpointing(model)
        return model

    assert per_block(checkpointed) == 4 * S * B * H
    # One block's own is there while it is done again, and the loss's copies of the logits before.
    whole, one = counted(checkpointed(4)), per_block(llama)
    assert one <= whole.activations - 4 * 4 * S * B * H <= 3 * one


def test_sdpa_does_not_keep_the_attention_and_eager_does():
    more = per_block(partial(llama, attention="eager")) - per_block(llama)
    # Eager keeps the softmax's output, 4 a s^2 b; sdpa its own output (which eager has as a copy too) and a log-sum.
    assert more == pytest.approx(4 * A * S * S * B, abs=4 * S * B * (H + A))


def test_the_logits_and_their_log_softmax():
    wide = 4096

    def with_vocabulary(rows: int) -> int:
        model = llama(1)
        model.lm_head = nn.Linear(H, rows, bias=False, device="meta")
        model.config.vocab_size = rows
        return counted(model).saved

    # fp32: of each kept position its log-softmax; the logits themselves go where the loss has made its copy.
    a_row = (with_vocabulary(2 * wide) - with_vocabulary(wide)) / wide
    assert a_row == pytest.approx(4 * B * (S - 1), rel=0.05) or a_row == pytest.approx(4 * B * (2 * S - 1), rel=0.05)


class Saved:
    """What autograd holds of a real model: each storage once, parameters and inputs left out."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        outside = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *batch.values())}
        self.storages: dict[int, torch.UntypedStorage] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if (storage := t.untyped_storage())._cdata not in outside:
                self.storages[storage._cdata] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.loss = causal_lm_loss()(model, batch)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize(
    "make",
    [
        llama,
        pytest.param(gpt2, marks=full),
        pytest.param(partial(llama, attention="eager"), marks=full),
        pytest.param(partial(gpt2, dropout=0.1), marks=full),
    ],
)
def test_it_is_what_autograd_saves(make):
    batch = {name: torch.randint(V, shape) for name, (shape, _) in SHAPES.items()}
    real = [Saved(make(layers, device="cpu"), batch).bytes for layers in (2, 3)]
    assert per_block(make) == real[1] - real[0]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=full), True])
def test_the_peak_is_the_allocators(checkpointing):
    meta, real = llama(3), llama(3, device="cpu")
    for model in (meta, real) if checkpointing else ():
        apply_activation_checkpointing(model)
    batch = {name: torch.randint(V, shape) for name, (shape, _) in SHAPES.items()}
    causal_lm_loss()(real, batch).backward()  # gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        causal_lm_loss()(real, batch).backward()
    at = rise = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            at += event.nbytes()
            rise = max(rise, at)
    assert counted(meta).activations == pytest.approx(rise, rel=0.03)


def test_tied_weights_stay_one_and_gradients_are_counted_by_owner():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=172, num_hidden_layers=2, num_attention_heads=A,
            tie_word_embeddings=True, use_cache=False,
        ))  # fmt: skip
    own, whole = sum(p.numel() for p in model.model.layers[0].parameters()), sum(p.numel() for p in model.parameters())
    last = counted(model).segments[-1]
    assert last.with_gradients - last.activations <= 4 * whole
    backwards = [s for s in counted(llama(2)).segments if s.kind == "backward" and s.block == 0]
    assert len(backwards) == 1
    head = V * H + H  # the head's and the last norm's gradients are there before the first block's
    assert backwards[0].with_own_gradients - backwards[0].activations <= 4 * (own + head)


@pytest.mark.parametrize(
    ("make", "checkpointing"),
    [pytest.param(llama, False, marks=full), (llama, True), pytest.param(gpt2, False, marks=full)],
)
def test_many_blocks_are_a_few_and_what_one_adds(make, checkpointing):
    def made(layers: int) -> nn.Module:
        model = make(layers)
        if checkpointing:
            apply_activation_checkpointing(model)
        return model

    model, all_nine = made(9), blocks(made(9))
    with few_of(model, blocks(model)) as few:
        assert len(few) == len(blocks(model)) == 4
        short = run_without_storage(model, causal_lm_loss(), SHAPES, few)
    assert len(blocks(model)) == 9
    gradient = 4 * sum(p.numel() for p in all_nine[0].parameters())
    assert with_more_blocks(short, 5, gradient).saved == counted(made(9)).saved
    assert worst(with_more_blocks(short, 5, gradient)) == worst(counted(made(9)))


def worst(moments: Pass) -> dict[tuple[str, int | None], tuple[int, ...]]:
    """By kind and block what of them is largest."""
    out: dict[tuple[str, int | None], tuple[int, ...]] = {}
    for s in moments.segments:
        now = (s.activations, s.with_own_gradients, s.with_gradients)
        out[s.kind, s.block] = tuple(map(max, now, out.get((s.kind, s.block), now)))
    return out


def test_blocks_that_differ_are_all_run():
    model = llama(7)
    blocks(model)[3].mlp.gate_proj = nn.Linear(H, 200, bias=False, device="meta")
    with few_of(model, blocks(model)) as few:
        assert len(few) == 7


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=full), True])
def test_noise_on_merged_weights_takes_one_layer_at_a_time(tmp_path: Path, bf16: bool) -> None:
    """In fp32, beside its copy as the forward computes; what stays for the backward is a number per row."""
    how: dict[str, Any] = {"lora": LORA, "backend": "fsdp2", "bf16": bf16}
    few = {"block_size": 8, "per_device_train_batch_size": 1}  # else activations hide a small layer
    plain, noisy = (look_at_model(replace(job(how | more, tmp_path, toy=True), **few)).moments for more in ({}, FLAT))
    assert plain is not None and noisy is not None
    layer, rows = 32 * 64, 2 * (4 * 32 + 2 * 64 + 32)  # the largest; of all seven in two blocks
    assert 0 <= noisy.saved - plain.saved <= 4 * rows
    for kind in ("forward", "backward"):
        more = [
            a.activations - b.activations
            for a, b in zip(noisy.segments, plain.segments, strict=True)
            if a.kind == kind and a.block is not None
        ]
        assert 2 * layer < max(more) <= (10 if bf16 else 8) * layer + 4 * rows, kind
