"""Laws of a LandscapeTrainer: the papers' weights, the stock Trainer's with method none, probes, trl, refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import elastic_lsopt as lso
from tests.cases.trainer import (
    LENGTH,
    LR,
    METHODS,
    MOMENTUM,
    VOCABULARY,
    apart,
    arguments,
    by_paper,
    counting,
    end,
    fresh,
    json_of,
    llama,
    momentum,
    natively_sharded,
    rank,
    rows,
    trained_of,
    trainer_class,
    weights_of,
    world_size,
)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func` that is the model's own loss."""
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def against_paper(
    kind: str, method: str, clip: float = 0.0, lora: bool = False, tied: bool = False, own_loss: bool = False,
    made: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Six updates of three micro-batches with unequal counts of tokens, an evaluation after each; `made`: with an
    optimizer that is there already."""
    world = world_size()
    paper = by_paper(method, clip, lora, tied)
    items: list[int] = []

    class Noting(trainer_class(kind)):
        def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
            if self.model.training:
                items.append(int(num_items_in_batch))
            return super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **more)

    with fresh(), tempfile.TemporaryDirectory() as folder:
        data = rows()
        args = arguments(kind, folder, world, max_grad_norm=clip, eval_strategy="steps", eval_steps=1, **more)
        landscape = {"method": method, **METHODS[method]}
        counter = counting()
        model = natively_sharded(folder) if kind == "native" else llama(lora, tied)
        own: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM})}
        trainer = Noting(
            model=model, args=args, train_dataset=data, eval_dataset=data[:8], landscape=landscape,
            compute_loss_func=summed if own_loss else None, callbacks=[counter],
            **{"optimizers": (momentum(model.parameters()), None)} if made else own,
        )  # fmt: skip
        trainer.train()
        found = weights_of(trainer)
        log = [row for row in trainer.state.log_history if "loss" in row]
        step = trainer._landscape_step
        out = {
            "dw": apart(found, paper.weights), "moved": apart(found, paper.start), "backend": step.backend.name,
            "dloss": max(abs(row["loss"] - loss) for row, loss in zip(log, paper.losses, strict=True)),
            "lr": [row["learning_rate"] for row in log], "items": items, "counts": counter.counts,
            "passes": trainer.last_step and trainer.last_step.passes, "norms": [row.get("grad_norm") for row in log],
            "paper_norms": paper.norms, "tokens": paper.tokens,
        }  # fmt: skip
        end(trainer)
    return out


def beside_stock(kind: str) -> dict[str, Any]:
    """Method none against the Trainer itself, dropout and all."""
    from transformers import Trainer

    found, logs = [], []
    for parent in (Trainer, lso.LandscapeTrainer):
        with fresh(), tempfile.TemporaryDirectory() as folder:
            args = arguments(kind, folder, world_size(), max_grad_norm=0.5, label_smoothing_factor=0.1)
            model = llama(lora=True)
            for module in model.modules():
                if hasattr(module, "lora_dropout"):
                    module.lora_dropout["default"] = nn.Dropout(0.2)
            trainer = trainer_class(kind, parent)(model=model, args=args, train_dataset=rows())
            trainer.train()
            found.append(weights_of(trainer))
            logs.append([{k: row.get(k) for k in ("loss", "grad_norm")} for row in trainer.state.log_history[:-1]])
            end(trainer)
    return {"dw": apart(*found), "logs": logs[0] == logs[1]}


def largest_curvature(model: Any, batches: Sequence[Any]) -> float:
    """The largest eigenvalue of the mean loss's Hessian by power iteration on H + shift, with autograd alone."""
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        loss = sum(model(**batch).loss for batch in batches) / len(batches)
        gradient = torch.autograd.grad(loss, params, create_graph=True)
    torch.manual_seed(3)
    v = [torch.randn_like(p) for p in params]
    value = shift = 0.0
    for _ in range(80):
        norm = torch.cat([t.flatten() for t in v]).norm()
        v = [t / norm for t in v]
        product = torch.autograd.grad(gradient, params, v, retain_graph=True)
        value = float(sum((a * b).sum() for a, b in zip(product, v, strict=True)))
        shift = max(shift, float(torch.cat([h.flatten() for h in product]).norm()))  # none is below -shift, soon
        v = [h + shift * t for h, t in zip(product, v, strict=True)]
    return value


def measured(kind: str, method: str) -> dict[str, Any]:
    """What a callback measures on the way, against `lso.attach` on a model with those weights; and the weights, against
    those of a run that measured nothing."""
    world = world_size()
    every = [
        {"input_ids": ids, "labels": ids} for ids in (torch.arange(16).view(2, 8) + 2 * i for i in range(2 * world))
    ]
    measures: dict[str, Any] = {"lambda_max": {"tolerance": 1e-4}, "distance_from_start": {}, "noise_scale": {}}
    callback = lso.ProbeCallback(measures, batches=every[rank() :: world], every_steps=2)
    found = []
    for callbacks in ([callback], []):
        with fresh(), tempfile.TemporaryDirectory() as folder:
            trainer = trainer_class(kind)(
                model=llama(), args=arguments(kind, folder, world, max_steps=4), train_dataset=rows(),
                landscape={"method": method, **METHODS[method]}, callbacks=callbacks,
                optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
            )  # fmt: skip
            trainer.train()
            found.append(weights_of(trainer))
            end(trainer)
    plain = llama()
    start = trained_of(plain)
    plain.load_state_dict(found[0])
    wanted = {"distance": sum(float((found[0][n] - t).double().square().sum()) for n, t in start.items()) ** 0.5}
    wanted["lambda_max"] = largest_curvature(plain.eval(), every)
    probes = callback.results[-1]["probes"]
    assert all(probes.values()), probes
    return {
        "dw": apart(*found), "steps": [row["step"] for row in callback.results], "wanted": wanted,
        "lambda_max": probes["lambda_max"]["eigenvalues"][0], "distance": probes["distance_from_start"]["value"],
    }  # fmt: skip


def sft(lora: bool, method: str = "sam") -> dict[str, Any]:
    """trl's SFTTrainer against the papers' loop: weights, tokens, and what it measures of each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, default_data_collator
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows()])
    found, logs = [], []
    for landscape in ({"method": method, **METHODS[method]}, None):
        with fresh(), tempfile.TemporaryDirectory() as folder:
            args = arguments(
                "ddp", folder, world_size(), max_grad_norm=0.5, kind=SFTConfig, bf16=False, max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True}, activation_checkpointing=False,
            )  # fmt: skip
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")
            kind: Any = type("LandscapeSFT", (lso.LandscapeTrainerMixin, SFTTrainer), {})
            trainer = kind(
                model=llama(lora), args=args, train_dataset=data, data_collator=default_data_collator,
                processing_class=tokenizer, landscape=landscape,
                optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
            )  # fmt: skip
            trainer.train()
            found.append(weights_of(trainer))
            logs.append([row for row in trainer.state.log_history if "num_tokens" in row])
    names = "num_tokens", "entropy", "mean_token_accuracy"
    first = [[row[0][name] for name in names] for row in logs]
    return {
        "dw": apart(found[0], by_paper(method, 0.5, lora).weights), "first_step": first,
        "tokens": logs[0][-1]["num_tokens"], "of": len(data) * LENGTH,
    }  # fmt: skip


def refusals() -> list[str]:
    """What of several ranks is refused with words that name it, in one line."""
    import pytorch_optimizer

    wrong: list[tuple[str, str, dict[str, Any], Any, str]] = [
        ("DDP for FSDP", "ddp", {"fsdp": True}, None, "accelerate has made MULTI_CPU of it"),
        ("no gradient_clipping", "zero2", {"deepspeed": {"zero_optimization": {"stage": 2}}}, None,
         'write "gradient_clipping": "auto" into it'),
        ("an optimizer of the JSON", "zero2", {"deepspeed": json_of(2, scheduler={"type": "WarmupLR", "params": {}})},
         None, "DeepSpeed with scheduler is not tested"),
        ("auto_find_batch_size", "ddp", {"auto_find_batch_size": True}, None, "set per_device_train_batch_size"),
        ("torch_compile", "ddp", {"torch_compile": True}, None, "torch_compile is tested on one process"),
        ("fp16 in the JSON", "zero2", {"deepspeed": json_of(2, fp16={"enabled": "auto"}), "fp16": True}, None,
         "fp16 needs loss scaling"),
        ("a base of whole matrices", "zero2", {}, (pytorch_optimizer.Lamb, {"lr": 0.1}), "needs whole parameters"),
    ]  # fmt: skip
    told = []
    for name, place, more, chosen, says in wrong:
        with fresh(), tempfile.TemporaryDirectory() as folder:
            try:
                lso.LandscapeTrainer(
                    model=llama(), args=arguments(place, folder, world_size(), **more), train_dataset=rows(),
                    landscape=None if name == "DDP for FSDP" else "sam", optimizer_cls_and_kwargs=chosen,
                ).train()  # fmt: skip
            except lso.UserError as error:
                told.append(name if says in str(error) and "\n" not in str(error) else f"{name}: {error}")
            except Exception as error:
                told.append(f"{name}: {type(error).__name__}: {error}")
            else:
                told.append(f"{name}: not refused")
    return told


def benchmark(size: str) -> dict[str, Any]:
    """The benchmark of steps, in an accelerate of its own."""
    from benchmarks.step.trainer_steps import compare

    with fresh():
        return compare(size)


def updated(kind: str, landscape: str, alone: bool = False) -> dict[str, Any]:
    """Weights and norms of a method with LAMB beside AdamW as the Trainer's optimizer; `alone`: with LAMB for all, as
    the Trainer makes it (under FSDP it takes none that is there)."""
    with fresh(), tempfile.TemporaryDirectory() as folder:
        model = natively_sharded(folder) if kind == "native" else llama()
        groups = [
            {"params": [p for p in model.parameters() if p.dim() == 2], "update": "lamb"},
            {"params": [p for p in model.parameters() if p.dim() != 2], "update": "AdamW"},
        ]
        args = arguments(
            kind, folder, world_size(), max_steps=3, max_grad_norm=0.5, lr_scheduler_type="linear", learning_rate=0.02
        )
        own = {"optimizer_cls_and_kwargs": (lso.UpdateOptimizer, {"update": "lamb", "lr": 0.02})}
        given = own if alone else {"optimizers": (lso.UpdateOptimizer(groups, lr=0.02), None)}
        trainer = trainer_class(kind)(model=model, args=args, train_dataset=rows(), landscape=landscape, **given)
        trainer.train()
        found = {n: t.tolist() for n, t in weights_of(trainer).items()}
        norms = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
        end(trainer)
    return {"weights": found, "norms": norms}
