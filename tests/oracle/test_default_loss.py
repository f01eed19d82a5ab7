"""A Hugging Face model's default loss is `model(**batch).loss` of the whole batch, however it is cut into units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.oracle.losses.default_loss import as_loss
from elastic_lsopt.oracle.losses.loss import Loss, classification_loss

VOCABULARY, ROWS, LENGTH = 40, 6, 9
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 24,
        "encoder_ffn_dim": 24, "decoder_attention_heads": 2, "encoder_attention_heads": 2,
        "max_position_embeddings": 32}  # fmt: skip
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def build(kind: str, config: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    return model if "Mixtral" in kind else model.double()  # torch multiplies grouped experts in fp32 and bf16 alone


MODELS: dict[str, Any] = {
    "llama": lambda: build("LlamaForCausalLM", "LlamaConfig", **SMALL),
    "mixtral": lambda: build("MixtralForCausalLM", "MixtralConfig", **SMALL, **MIXTURE),
    "bart decoder, which does not shift": lambda: build("BartForCausalLM", "BartConfig", **BART),
    "bert, masked": lambda: build("BertForMaskedLM", "BertConfig", **SMALL),
    "bert, tokens": lambda: build("BertForTokenClassification", "BertConfig", **SMALL, num_labels=VOCABULARY),
    "t5": lambda: build("T5ForConditionalGeneration", "T5Config", **T5),
}
SPLIT = ("llama", "mixtral")


def tokens(masked_row: int | None = None) -> dict[str, Tensor]:
    """Rows with very different numbers of masked labels, so that rows and tokens weigh differently."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : row + 2] = -100
    labels[0, 0] = ids[0, 0]
    if masked_row is not None:
        labels[masked_row] = -100
    return {"input_ids": ids, "labels": labels}


def one_by_one(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def check(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Loss and gradient of single rows together against transformers' of the whole batch."""
    wanted = model(**batch).loss
    wanted_gradient = gradient_of(model, wanted)
    space, oracle = lso.attach(model, None, one_by_one(batch))
    gradient = oracle.gradient()
    close = 1e-12 if wanted.dtype == torch.float64 else 1e-5
    assert oracle.losses[0] == pytest.approx(wanted.item(), rel=close)
    assert oracle.loss() == pytest.approx(wanted.item(), rel=close)
    assert space.norm(gradient) == pytest.approx(wanted_gradient.norm().item(), rel=close)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked_row", [None, 3])
def test_tokens_weigh_alike(name: str, masked_row: int | None) -> None:
    """Also where all labels of a row are masked, whose own loss is 0 / 0."""
    model = MODELS[name]()
    assert isinstance(as_loss(None, model), Loss) == (name in SPLIT)
    check(model, tokens(masked_row))


@pytest.mark.parametrize("name", ["llama", "bert, masked", "t5"])
def test_a_compiled_model_is_weighed_as_the_model_is(name: str) -> None:
    """Without compiling it: the weight is asked before a forward."""
    model, rows = MODELS[name](), one_by_one(tokens())
    compiled: Any = torch.compile(model)
    _, oracle = lso.attach(compiled, None, rows)
    shifted = sum((r["labels"][:, 1:] != -100).sum().item() for r in rows)
    assert oracle.weight == (shifted if name == "llama" else shifted + 1) != ROWS
    assert isinstance(as_loss(None, compiled), Loss) == (name == "llama")


def test_the_routers_loss_of_a_mixture_is_added() -> None:
    """Weighed as the tokens are: the load balance of a micro-batch is its own."""
    model = build("MixtralForCausalLM", "MixtralConfig", **SMALL, **MIXTURE, output_router_logits=True,
                  router_aux_loss_coef=0.5)  # fmt: skip
    batch = tokens()
    rows = one_by_one(batch)
    counts = [(r["labels"][:, 1:] != -100).sum().item() for r in rows]
    wanted = sum(model(**r).loss.item() * n for r, n in zip(rows, counts, strict=True)) / sum(counts)
    _, oracle = lso.attach(model, None, rows)
    assert oracle.loss() == pytest.approx(wanted, rel=1e-5)
    model.config.output_router_logits = False
    assert wanted - model(**batch).loss.item() > 0.1, "the term was too small to be missed"
    _, together = lso.attach(model, None, [batch])
    model.config.output_router_logits = True
    _, together = lso.attach(model, None, [batch])
    assert together.loss() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def classifier(**settings: Any) -> nn.Module:
    return build("BertForSequenceClassification", "BertConfig", **SMALL, **settings)


def texts(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens()["input_ids"], "labels": labels}


several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)


def test_several_labels_a_sample() -> None:
    """transformers tells them by their type, and writes what it has found into the config."""
    reference = classifier(num_labels=3)
    wanted = reference(**texts(several)).loss.item()
    assert reference.config.problem_type == "multi_label_classification"
    model = classifier(num_labels=3)
    _, oracle = lso.attach(model, None, one_by_one(texts(several)))
    assert oracle.loss() == pytest.approx(wanted, rel=1e-9)
    assert model.config.problem_type == "multi_label_classification"
    check(classifier(num_labels=3), texts(several))


def test_one_label_a_sample_and_regression() -> None:
    check(classifier(num_labels=3), texts(torch.tensor([0, 2, 1, -100, 1, 0])))
    check(classifier(num_labels=1), texts(torch.linspace(-1, 1, ROWS, dtype=torch.float64)))
    check(classifier(num_labels=3, problem_type="multi_label_classification"), texts(several))


def test_the_products_of_several_labels() -> None:
    """The criterion's own curvature against autograd's."""
    draw = torch.Generator().manual_seed(2)
    z, t = (torch.randn(ROWS, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    loss = classification_loss()

    def criterion(logits: Tensor) -> Tensor:
        return loss.criterion(logits, {"labels": several})

    wanted = torch.autograd.functional.hvp(criterion, z, t)[1]
    assert torch.allclose(loss.output_product(z, {"labels": several}, t.clone()), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "make,labels,says",
    [
        (lambda: classifier(num_labels=3), torch.tensor([0, 1, 2, 0, 7, 1]), r"label 7 of sample 0 .* 0 … 2,"),
        (lambda: classifier(num_labels=3), torch.tensor([0, 1, 2, 0, -1, 1]), r"label -1 of sample 0 .* 0 … 2,"),
        (MODELS["llama"], torch.full((ROWS, LENGTH), VOCABULARY), r"label 40 of sample 0 .* 0 … 39,"),
        (MODELS["bert, masked"], torch.full((ROWS, LENGTH), VOCABULARY), r"label 40 of sample 0 .* 0 … 39,"),
        (lambda: classifier(num_labels=3), several[:, :2], r"labels of shape \(1, 2\) .* logits of shape \(1, 3\)"),
        (lambda: classifier(num_labels=3, problem_type="single_label_classification"), several, "give whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(make: Any, labels: Tensor, says: str) -> None:
    _, oracle = lso.attach(make(), None, one_by_one(texts(labels)))
    with pytest.raises(lso.UserError, match=says) as raised:
        oracle.loss()
    assert "\n" not in str(raised.value)


def test_the_sample_that_is_named() -> None:
    logits, labels = torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.long)
    labels[0], labels[2, 3], labels[3, 0] = -100, 3, 9
    with pytest.raises(lso.UserError, match="label 3 of sample 2 "):
        classification_loss().criterion(logits, {"labels": labels})
