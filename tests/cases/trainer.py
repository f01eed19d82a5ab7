"""Hugging Face's Trainer with landscape-aware steps, on every backend, beside the papers' loops on one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.cases.engines import HYPERPARAMETERS
from tests.oracles import paper_loops, sam_family

STEPS, ACCUMULATED, ROWS, LENGTH, VOCABULARY, LR, MOMENTUM = 6, 3, 12, 8, 31, 0.2, 0.5
"""Updates, micro-batches and rows of one, tokens of a row."""
METHODS: dict[str, dict[str, Any]] = {
    "none": {}, "sam": {"rho": 0.3}, "asam": {"rho": 0.2, "eta": 0.01},
    "lpf_sgd": {"parts": 2, "gamma": 0.1, "alpha": 1.0},
}  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {
    name: hyper | {"ae_sam": {"lambda1": 0.2, "lambda2": 0.2}, "entropy_sgd": {"inner_steps": 2}}.get(name, {})
    for name, hyper in HYPERPARAMETERS.items()
    if name not in (*METHODS, "flat_lora", "esam", "functional_sam")
} | {"nbar": {"alpha": {"start": 0.3, "end": 0.3}}}
"""The others that need no logits; constants where the paper's loop counts tokens and the Trainer steps."""
METHODS |= FAMILY


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
        self.base, self.param_groups, self.state = base, base.param_groups, base.state
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


@dataclass(frozen=True)
class Paper:
    """What the paper's loop makes: weights before and after, and of each step loss, norm of the gradient and tokens."""

    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    tokens: list[int]


@cache
def by_paper(method: str, clip: float = 0.0, lora: bool = False, tied: bool = False) -> Paper:
    """The paper's loop on one process. A norm is that after clipping."""
    model, data, size = llama(lora, tied), rows(), ROWS // ACCUMULATED
    updates = [
        [tokens(update[at : at + size]) for at in range(0, len(update), size)]
        for update in (data[k * ROWS : (k + 1) * ROWS] for k in range(STEPS))
    ]
    start = trained_of(model)
    base: Any = Scheduled(momentum([p for p in model.parameters() if p.requires_grad]))
    with named_as_in(model):
        # The seed is that of TrainingArguments.
        losses = paper_loops.run(ByToken(model), updates, base, method, METHODS[method] | {"seed": 42}, clip=clip)
    return Paper(start, trained_of(model), losses, base.norms, [sum(len(y) for _, y in update) for update in updates])


@contextmanager
def named_as_in(model: Any) -> Iterator[None]:
    """Noise is drawn by a parameter's name; the loop's wrapper puts a word before it."""
    own = paper_loops.trained
    for loops in (paper_loops, sam_family):
        loops.trained = lambda _: own(model)  # type: ignore[assignment]
    try:
        yield
    finally:
        paper_loops.trained = sam_family.trained = own


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
