"""Hugging Face's Trainer with landscape-aware steps, on every backend, beside the papers' loops on one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import elastic_lsopt as lso
from tests.oracles import paper_loops

STEPS, ACCUMULATED, ROWS, LENGTH, VOCABULARY, LR, MOMENTUM = 6, 3, 12, 8, 31, 0.2, 0.5
"""Updates, micro-batches and rows of one, tokens of a row."""
METHODS: dict[str, dict[str, Any]] = {
    "none": {}, "sam": {"rho": 0.3}, "asam": {"rho": 0.2, "eta": 0.01},
    "lpf_sgd": {"parts": 2, "gamma": 0.1, "alpha": 1.0},
}  # fmt: skip


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rows() -> list[dict[str, Tensor]]:
    """Unequal counts of tokens; the last update has a micro-batch less."""
    draw, out = torch.Generator().manual_seed(0), []
    for i in range(STEPS * ROWS - ROWS // ACCUMULATED):
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=draw)
        labels = ids.clone()
        labels[: (5 * i) % (LENGTH - 1)] = -100
        out.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return out


def llama(lora: bool = False, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.2, tie_word_embeddings=tied,
            use_cache=False,
        )
    )  # fmt: skip
    if lora:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


# -- the papers' loop ------------------------------------------------------------------------------------------------


class ByToken(nn.Module):
    """The logits of one token after another, so that a unit of the papers' loop weighs what its tokens weigh."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x[:, :-1]).logits
        return logits[torch.arange(len(x)), x[:, -1]]


def tokens(some: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of some rows, each token that is trained: (row, the place before it), and the token."""
    found = [
        (torch.cat([row["input_ids"], torch.tensor([at - 1])]), row["labels"][at])
        for row in some
        for at in range(1, LENGTH)
        if row["labels"][at] != -100
    ]
    return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


class Scheduled:
    """An optimizer whose rate falls linearly to 0, as the Trainer's default does."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.norms: list[float] = []
        """Of the gradients that it has stepped with."""
        self.schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda k: 1 - k / STEPS)

    def step(self) -> None:
        gradients = [p.grad for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(paper_loops.norm(gradients))
        self.base.step()
        self.schedule.step()


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def by_paper(model: Any, method: str, clip: float = 0.0) -> tuple[list[float], list[float], list[int]]:
    """The paper's loop on one process, which trains `model`: loss, norm of the gradient and tokens of each step."""
    data, size = rows(), ROWS // ACCUMULATED
    updates = [
        [tokens(update[at : at + size]) for at in range(0, len(update), size)]
        for update in (data[k * ROWS : (k + 1) * ROWS] for k in range(STEPS))
    ]
    by_token = ByToken(model)
    base: Any = Scheduled(momentum([p for p in model.parameters() if p.requires_grad]))
    lpf = {"seed": 42} if method == "lpf_sgd" else {}  # TrainingArguments' seed
    with _named_as_in(model):
        losses = paper_loops.run(by_token, updates, base, method, METHODS[method] | lpf, clip=clip)
    return losses, base.norms, [sum(len(y) for _, y in update) for update in updates]


@contextmanager
def _named_as_in(model: Any) -> Iterator[None]:
    """Noise is drawn by a parameter's name; the loop's wrapper puts a word before it."""
    own = paper_loops.trained
    paper_loops.trained = lambda _: own(model)  # type: ignore[assignment]
    try:
        yield
    finally:
        paper_loops.trained = own


# -- the Trainer -----------------------------------------------------------------------------------------------------


@contextmanager
def fresh() -> Iterator[None]:
    """accelerate and transformers keep the first Trainer's world for the process: forget it before and after."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()

    before = dict(os.environ)
    forget()
    try:
        yield
    finally:
        forget()
        os.environ.clear()
        os.environ.update(before)


def json_of(stage: int, **more: Any) -> dict[str, Any]:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto"), **more}


def arguments(place: str, folder: str, world: int = 1, *, kind: Any = None, **more: Any) -> Any:
    """TrainingArguments, or those of another `kind`."""
    from transformers import TrainingArguments

    if place == "fsdp2":  # the Trainer's default, FULL_STATE_DICT, cannot be saved on a CPU
        more = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}} | more
    if place.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build at start
        more = {"deepspeed": json_of(int(place[-1]))} | more
    given = {
        "output_dir": folder, "use_cpu": True, "learning_rate": LR, "lr_scheduler_type": "linear", "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // ACCUMULATED // world, "gradient_accumulation_steps": ACCUMULATED,
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return (kind or TrainingArguments)(**(given | more))


def trainer_class(kind: str, parent: Any = None) -> Any:
    """On a CPU accelerate makes DDP of FSDP2 without a word; told so by hand it makes the real one."""
    parent = parent or lso.LandscapeTrainer
    if kind != "fsdp2":
        return parent
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharded(parent):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.state.distributed_type, self.is_fsdp_enabled = DistributedType.FSDP, True
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)

    return Sharded


def counting() -> Any:
    """A callback that counts the events."""
    from transformers import TrainerCallback

    events = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "save", "evaluate")
    kind: Any = type("Counting", (TrainerCallback,), {})
    for event in events:

        def count(self: Any, *args: Any, event: str = event, **more: Any) -> None:
            self.counts[event] = self.counts.get(event, 0) + 1

        setattr(kind, f"on_{event}", count)
    made = kind()
    made.counts = {}
    return made


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Whole, by name, on every rank."""
    if trainer.is_deepspeed_enabled:
        import deepspeed

        read: Callable[[Any], Any] = deepspeed.utils.safe_get_full_fp32_param
        if trainer.deepspeed.zero_optimization_stage() == 0:
            read = torch.Tensor.detach
        return {n: read(p).clone() for n, p in trainer.deepspeed.module.named_parameters() if p.requires_grad}
    named = trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters()
    own = {
        n.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p for n, p in named if p.requires_grad
    }
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in own.items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def trained_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def end(trainer: Any) -> None:
    """Free what the next case must not meet."""
    if trainer.is_deepspeed_enabled and hasattr(trainer, "deepspeed"):
        trainer.deepspeed.destroy()


def natively_sharded(folder: str) -> Any:
    """The model under `fully_shard` as transformers loads it, without accelerate's part in it."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    own = [folder]
    dist.broadcast_object_list(own)
    if rank() == 0:
        llama().save_pretrained(own[0])
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(own[0], distributed_config=DistributedConfig(fsdp_size=world_size()))


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func` that is the model's own loss."""
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def against_paper(
    kind: str, method: str, clip: float = 0.0, lora: bool = False, tied: bool = False, own_loss: bool = False,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Six updates of three micro-batches with unequal counts of tokens, an evaluation after each."""
    world = world_size()
    plain = llama(lora, tied)
    start = trained_of(plain)
    losses, norms, tokens_of = by_paper(plain, method, clip)
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
        trainer = Noting(
            model=natively_sharded(folder) if kind == "native" else llama(lora, tied), args=args,
            train_dataset=data, eval_dataset=data[:8], landscape=landscape,
            compute_loss_func=summed if own_loss else None, callbacks=[counter], optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
        )  # fmt: skip
        trainer.train()
        found = weights_of(trainer)
        log = [row for row in trainer.state.log_history if "loss" in row]
        step = trainer._landscape_step
        out = {
            "dw": apart(found, trained_of(plain)), "moved": apart(found, start), "backend": step.backend.name,
            "dloss": max(abs(row["loss"] - loss) for row, loss in zip(log, losses, strict=True)),
            "lr": [row["learning_rate"] for row in log], "items": items, "counts": counter.counts,
            "passes": trainer.last_step and trainer.last_step.passes, "norms": [row["grad_norm"] for row in log],
            "paper_norms": norms, "tokens": tokens_of,
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


# -- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lagging:
    """Half of the last step's gradient beside this one's: what it remembers is half of a step."""

    parts = 1

    def init(self, space: Any) -> Any:
        return {"last": space.zeros(), "seen": 0}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        mine = oracle.gradient().clone()
        made = mine.clone().add_(state["last"], 0.5)
        state["last"], state["seen"] = mine, state["seen"] + 1
        return made


def run(kind: str, folder: str, resume: str | None = None, parent: Any = None, lora: bool = False, **more: Any) -> Any:
    """A trainer after its run, inside `fresh()`."""
    args = arguments(kind, folder, world_size(), **({"save_strategy": "steps", "save_steps": 2} | more))
    trainer = trainer_class(kind, parent)(
        model=natively_sharded(folder) if kind == "native" else llama(lora), args=args, train_dataset=rows(),
        eval_dataset=rows()[:8], landscape=Lagging(), optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.02, "eps": 1e-3}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved(kind: str, folder: str, **more: Any) -> dict[str, Any]:
    """A run that saves after every second step; its weights, and what lies in the folder."""
    with fresh():
        trainer = run(kind, folder, **more)
        found = {n: t.tolist() for n, t in weights_of(trainer).items()}
        seen = trainer._landscape_step.state["seen"]
        end(trainer)
    if dist.is_initialized():
        dist.barrier()
    return {"weights": found, "seen": seen, "files": sorted(p.name for p in (Path(folder) / "checkpoint-2").iterdir())}


def resumed(kind: str, folder: str, wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    """From the checkpoint of step 2; how far the weights end from those of the run that was not stopped."""
    with fresh(), tempfile.TemporaryDirectory() as other:
        trainer = run(kind, other, resume=f"{folder}/checkpoint-2", save_strategy="no", **more)
        dw = apart(weights_of(trainer), {n: torch.tensor(t) for n, t in wanted.items()})
        out = {"dw": dw, "seen": trainer._landscape_step.state["seen"], "step": trainer.state.global_step}
        end(trainer)
    return out


# -- probes ----------------------------------------------------------------------------------------------------------


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
        shift = max(shift, abs(value) / 2)
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


def best_at_end(kind: str, folder: str) -> dict[str, Any]:
    """The metric is the best after step 2; the weights at the end are those that were there then."""
    from transformers import TrainerCallback

    then: dict[str, Tensor] = {}

    class Keeping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 2:
                then.update(weights_of(made[0]))

    made: list[Any] = []

    class Scored(trainer_class(kind)):
        def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
            found = super().evaluate(*args, **more) | {"eval_score": -abs(self.state.global_step - 2.0)}
            return found

    with fresh():
        args = arguments(
            kind, folder, world_size(), max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps",
            eval_steps=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip
        made.append(
            Scored(
                model=llama(), args=args, train_dataset=rows(), eval_dataset=rows()[:8], landscape=Lagging(),
                callbacks=[Keeping()],
            )
        )  # fmt: skip
        made[0].train()
        out = {"dw": apart(weights_of(made[0]), then), "best": Path(made[0].state.best_model_checkpoint).name}
        end(made[0])
    return out


def sft(lora: bool) -> dict[str, Any]:
    """trl's SFTTrainer against the papers' loop: weights, tokens, and what it measures of each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, default_data_collator
    from trl import SFTConfig, SFTTrainer

    plain = llama(lora)
    by_paper(plain, "sam", 0.5)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows()])
    found, logs = [], []
    for landscape in ({"method": "sam", **METHODS["sam"]}, None):
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
        "dw": apart(found[0], trained_of(plain)), "tokens": logs[0][-1]["num_tokens"], "of": len(data) * LENGTH,
        "first_step": first,
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
