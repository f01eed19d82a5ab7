"""What single ranges cannot say: values of a job's settings that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elastic_lsopt.config.consensus import consensus_conflicts
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.landscape_conflicts import landscape_conflicts
from elastic_lsopt.config.probes import read_probes
from elastic_lsopt.config.schedules import LOWER_LR, OF_SHAPE, BatchScheduleConfig
from elastic_lsopt.config.settings import (
    ADAMS,
    EVALUATE_ELSEWHERE,
    KEYS_OF_OPTIM,
    MOST_MICROBATCHES,
    MOST_WORKERS,
    NO_SQUARE_ROOT,
    TrainConfig,
    lr_rule,
)


def conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each contradiction, the message one sentence with what to do."""
    if (c.model is None) == (c.model_name_or_path is None):
        yield (
            "model",
            "give exactly one of model_name_or_path (a folder or name) and model (from scratch).",
        )
    if c.model is not None:
        yield from _model_conflicts(c.model, c.task)
    elif c.task == "classification":
        yield "task", "task=classification needs a torch model: model: {import: 'package.module:callable'}."
    if (c.dataset == "digits") != (c.task == "classification"):
        yield (
            "dataset",
            f"dataset={c.dataset} does not fit task={c.task}: digits goes with classification.",
        )

    yield from _data_conflicts(c)
    if c.lora is not None and c.lora.base_dtype == "bf16":
        if c.backend == "deepspeed" and not c.bf16:
            yield (
                "lora.base_dtype",
                "lora.base_dtype=bf16 under DeepSpeed, which keeps the whole model in one precision, needs bf16: true.",
            )
        if c.task == "classification" and not c.bf16:
            yield (
                "lora.base_dtype",
                "lora.base_dtype=bf16 with task=classification, whose samples are fp32, needs bf16: true.",
            )

    if (c.max_steps is None) == (c.num_train_epochs is None):
        yield "max_steps", "give exactly one of max_steps and num_train_epochs."
    if c.global_batch_size < c.per_device_train_batch_size:
        yield (
            "global_batch_size",
            f"global_batch_size={c.global_batch_size} must be at least per_device_train_batch_size="
            f"{c.per_device_train_batch_size} (one micro-batch); raise it or lower the micro-batch.",
        )
    microbatches = -(-c.global_batch_size // c.per_device_train_batch_size)
    if microbatches > MOST_MICROBATCHES:
        yield (
            "global_batch_size",
            f"global_batch_size={c.global_batch_size} is {microbatches} micro-batches of per_device_train_batch_size="
            f"{c.per_device_train_batch_size}, the limit is {MOST_MICROBATCHES} per step; lower it or raise the "
            "micro-batch.",
        )
    if c.workers > MOST_WORKERS:
        yield (
            "workers",
            f"workers={c.workers} processes on one machine are beyond the limit of {MOST_WORKERS}; a job of more ranks "
            "is started on several nodes by a launcher.",
        )

    if c.backend == "deepspeed" and c.deepspeed is None:
        yield "backend", "backend=deepspeed needs a DeepSpeed JSON: deepspeed: configs/deepspeed/zero3.json."
    if c.backend != "deepspeed" and c.deepspeed is not None:
        yield (
            "deepspeed",
            f"deepspeed is given but backend={c.backend}; set backend: deepspeed or remove it.",
        )
    if c.backend != "fsdp2":
        for key, default in (("fsdp_replicas", 1), ("fsdp_reshard_after_forward", True), ("fsdp_cpu_offload", False)):
            if getattr(c, key) != default:
                yield key, f"{key} is for backend fsdp2, but backend={c.backend}; remove the key."
    if c.workers > 1 and c.workers % c.fsdp_replicas:
        yield "fsdp_replicas", f"fsdp_replicas={c.fsdp_replicas} must divide workers={c.workers}."

    if c.on_divergence == "rewind" and c.save_steps is None:
        yield "on_divergence", "on_divergence=rewind goes back to a checkpoint; set save_steps, or on_divergence: stop."
    if c.on_divergence == "stop":
        for key, default in (("rewind_lr_factor", 0.5), ("max_rewinds", 3)):
            if getattr(c, key) != default:
                yield key, f"{key} is for on_divergence rewind, but on_divergence=stop; remove the key."

    optims = {c.optim, *(str(group.get("optim", c.optim)) for group in c.param_groups)}
    if c.momentum and "sgd" not in optims:
        instead = "use adam_beta1" if c.optim in ADAMS else "use optim_args"
        yield "momentum", f"momentum is for optim sgd, but optim={c.optim}; {instead} or remove the key."
    if not optims & {*ADAMS, "muon"}:  # what is no matrix goes to AdamW beside muon
        for key, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
            if getattr(c, key) != default:
                yield key, f"{key} is for optim adam and adamw, but optim={c.optim}; remove the key."
    if (elsewhere := sorted(optims & EVALUATE_ELSEWHERE)) and c.lr_scheduler_type != "constant":
        yield (
            "lr_scheduler_type",
            f"lr_scheduler_type={c.lr_scheduler_type}: {elsewhere[0]} averages in place of a schedule; set "
            "lr_scheduler_type: constant (a warmup_ratio goes with it).",
        )
    for name, key in KEYS_OF_OPTIM.get(c.optim, {}).items():
        if name in c.optim_args:
            yield "optim_args", f"optim_args.{name} of optim={c.optim} is a key of the job: use {key}."
    if c.evaluate_average is not None and c.evaluate_average not in {*c.averages, *(optims & EVALUATE_ELSEWHERE)}:
        known = ", ".join(c.averages) or "none"
        yield (
            "evaluate_average",
            f"evaluate_average={c.evaluate_average} is not kept (averages: {known}); add it: averages: "
            f"{{{c.evaluate_average}: {{}}}}.",
        )
    for name in c.averages:
        if ":" in name:
            yield "averages", f"averages.{name} is no name; give one, and the path as {{import: {name!r}}}."
    yield from _group_conflicts(c)
    yield from _rate_conflicts(c)
    if c.batch_schedule is not None:
        yield from _batch_conflicts(c, c.batch_schedule)
    read_probes(c.probes)
    yield from landscape_conflicts(c, optims)
    yield from consensus_conflicts(c)
    if c.elastic is not None:
        yield from _elastic_conflicts(c, c.elastic)
        for name in c.report_to:
            if name != "tensorboard":
                yield (
                    "report_to",
                    f"report_to: {name} is not supported in an elastic job, where each change of members would begin "
                    "another run of it; use tensorboard.",
                )


def _rate_conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    given = {} if c.lr_scheduler_kwargs is None else c.lr_scheduler_kwargs.given()
    for name in given:
        if name not in OF_SHAPE.get(c.lr_scheduler_type, ()):
            [shape] = (shape for shape, names in OF_SHAPE.items() if name in names)
            key = f"lr_scheduler_kwargs.{name}"
            yield key, f"{key} is for lr_scheduler_type {shape}, but it is {c.lr_scheduler_type}; remove the key."
    if c.lr_scheduler_type == "warmup_stable_decay" and (decay := given.get("decay_ratio", 0.1)) + c.warmup_ratio > 1:
        yield (
            "lr_scheduler_kwargs.decay_ratio",
            f"decay_ratio={decay:g} and warmup_ratio={c.warmup_ratio:g} are together more than the job; lower one.",
        )
    theta, upper = given.get("theta", 0.01), given.get("upper_theta", 1.0)
    if theta > upper:
        key = "lr_scheduler_kwargs.theta"
        yield key, f"{key}={theta:g} is above upper_theta={upper:g}; lower it or raise upper_theta."
    if c.lr_scheduler_type == "autodrop" and c.learning_rate <= (lower := given.get("lower_lr", LOWER_LR)):
        key = "lr_scheduler_kwargs.lower_lr"
        yield (
            key,
            f"{key}={lower:g}, below which autodrop does not drop, is not below learning_rate={c.learning_rate:g}, so "
            "it never would; set it lower (0: no limit).",
        )
    if c.lr_scheduler_type == "inverse_sqrt" and not c.warmup_ratio and "timescale_samples" not in given:
        yield (
            "lr_scheduler_type",
            "lr_scheduler_type=inverse_sqrt needs lr_scheduler_kwargs: {timescale_samples: …}, or a warmup_ratio whose "
            "samples it takes for them.",
        )


def _rule_conflicts(c: TrainConfig, key: str, rule: str) -> Iterator[tuple[str, str]]:
    """Updates that a rule of the rate does not know; `key` holds lr_rule."""
    optims = {c.optim, *(str(group.get("optim", c.optim)) for group in c.param_groups)}
    if rule == "adascale" and (others := sorted(optims - {"sgd"})):
        yield (
            f"{key}.lr_rule",
            f"lr_rule=adascale is for optim sgd, whose step is the gradient that it measures, but optim={others[0]}; "
            "use sqrt.",
        )
    if rule == "sqrt" and (without := sorted(optims & NO_SQUARE_ROOT)):
        yield (
            f"{key}.lr_rule",
            f"lr_rule=sqrt is Adam's, and moves its betas; no paper says it of {without[0]}: set {key}.lr_rule: "
            "linear or none.",
        )


def _batch_conflicts(c: TrainConfig, b: BatchScheduleConfig) -> Iterator[tuple[str, str]]:
    microbatch, sizes, key = c.per_device_train_batch_size, b.sizes(c.global_batch_size), "batch_schedule"
    if b.kind == "constant":
        return
    if c.elastic is not None and c.elastic.policy == "scale_batch":
        yield key, "batch_schedule and elastic.policy=scale_batch both set the batch; use keep_batch, or remove it."
    for size in sizes:
        if size % microbatch:
            yield (
                key,
                f"{key}: a batch of {size} samples is not a multiple of per_device_train_batch_size={microbatch}; the "
                "batch changes in whole micro-batches.",
            )
        if size // microbatch > MOST_MICROBATCHES:
            yield key, f"{key}: a batch of {size} samples is over {MOST_MICROBATCHES} micro-batches per step; lower it."
    if b.kind == "ramp" and sizes[0] == sizes[1]:
        yield key, f"{key}: the ramp begins and ends at {sizes[0]} samples; give another min_ or max_global_batch_size."
    if b.kind == "noise_scale" and not sizes[0] < sizes[1]:
        yield (
            f"{key}.max_global_batch_size",
            f"{key}: max_global_batch_size={sizes[1]} must be above {sizes[0]}, where the batch begins.",
        )
    rule, k = lr_rule(c, b), max(sizes) / c.global_batch_size
    betas = [beta for beta in (c.adam_beta1, c.adam_beta2) if beta > 0 and k * (1 - beta) >= 1 - 1e-9]
    if rule == "sqrt" and c.optim in ADAMS and betas:
        yield (
            f"{key}.lr_rule",
            f"{key}: under lr_rule sqrt a batch of {max(sizes)} is {k:g} times global_batch_size, and k (1 - beta) "
            f"must be below 1 for beta={betas[0]:g}; use lr_rule: linear or none, a smaller batch, or a larger "
            "global_batch_size with its learning_rate.",
        )
    yield from _rule_conflicts(c, key, rule)


def _data_conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    if c.task != "causal_lm":
        for key in ("dataset_format", "packing"):
            if getattr(c, key) not in ("auto", "text", "none"):
                yield key, f"{key}={getattr(c, key)} is for task causal_lm, but task={c.task}; remove the key."
    if c.chat_template is not None and (c.task != "causal_lm" or c.dataset_format not in ("auto", "chat")):
        yield (
            "chat_template",
            f"chat_template is for chat data, but task={c.task}, dataset_format={c.dataset_format}; remove the key.",
        )
    if c.packing == "documents" and "import" in (c.model or {}):
        yield (
            "packing",
            "packing=documents needs a Hugging Face model whose attention is known to keep documents apart, and "
            "model.import names another; use packing: none or concatenate.",
        )
    if c.eval_dataset is not None and c.eval_fraction not in (0.0, 0.05):
        yield "eval_fraction", f"eval_fraction={c.eval_fraction} does not go beside eval_dataset; remove one of them."
    if c.eval_dataset is not None and c.task == "classification":
        yield "eval_dataset", "eval_dataset is for texts, and digits hold out a share of their own: use eval_fraction."
    if c.compute_metrics is not None and c.task == "causal_lm":
        yield (
            "compute_metrics",
            "compute_metrics is for classification: a language model's predictions, a number for each token and id, do "
            "not fit into memory; remove the key.",
        )
    if c.compute_metrics is not None and c.eval_dataset is None and not c.eval_fraction:
        yield "compute_metrics", "compute_metrics needs held-out data; set eval_fraction or eval_dataset."


def _group_conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    known = ("match", "dims", "optim", "learning_rate", "weight_decay", "optim_args")
    for i, group in enumerate(c.param_groups):
        key = f"param_groups[{i}]"
        for name in group:
            if name not in known:
                yield "param_groups", f"{key} has no key {name!r}; it has: {', '.join(known)}."
        match = group.get("match")
        patterns = [match] if isinstance(match, str) else match
        if not isinstance(patterns, list | tuple) or not patterns or not all(isinstance(p, str) for p in patterns):
            yield (
                "param_groups",
                f"{key}.match={match!r} must be a pattern of names, such as '*.bias', or a list of them.",
            )
        dims = group.get("dims")
        if dims is not None and (isinstance(dims, bool) or not isinstance(dims, int) or dims < 1):
            yield "param_groups", f"{key}.dims={dims!r} must be an integer >= 1."
        for name in ("learning_rate", "weight_decay"):
            value = group.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                yield "param_groups", f"{key}.{name}={value!r} must be a number >= 0."


def _elastic_conflicts(c: TrainConfig, e: ElasticConfig) -> Iterator[tuple[str, str]]:
    microbatch, batch = c.per_device_train_batch_size, c.global_batch_size
    if e.policy == "keep_batch":
        return
    yield from _rule_conflicts(c, "elastic", lr_rule(c, e))
    assert e.reference_workers is not None
    if batch % (microbatch * e.reference_workers):
        yield (
            "elastic.reference_workers",
            f"global_batch_size={batch} must be a multiple of per_device_train_batch_size={microbatch} x "
            f"reference_workers={e.reference_workers}: under scale_batch the micro-batches a worker stay.",
        )
    low, high = e.min_global_batch_size or 1, e.max_global_batch_size
    if high is not None and high // microbatch * microbatch < low:
        yield (
            "elastic.max_global_batch_size",
            f"no whole number of micro-batches of per_device_train_batch_size={microbatch} lies between "
            f"min_global_batch_size={low} and max_global_batch_size={high}; widen the bounds or lower the micro-batch.",
        )
    for name, value in (("global_batch_size", batch), ("learning_rate", c.learning_rate)):
        low, high = getattr(e, f"min_{name}") or 0, getattr(e, f"max_{name}")
        if value < low or (high is not None and value > high):
            yield (
                f"elastic.m{'in' if value < low else 'ax'}_{name}",
                f"{name}={value:g} lies outside elastic.min_{name} and max_{name}; the bounds must hold the job's own.",
            )


def _model_conflicts(model: dict[str, Any], task: str) -> Iterator[tuple[str, str]]:
    if ("import" in model) == ("model_type" in model):
        yield (
            "model",
            "model needs exactly one of model_type (a Hugging Face config) and import (torch).",
        )
    elif "import" in model:
        target = model["import"]
        if not isinstance(target, str) or not all(target.partition(":")):
            yield "model.import", f"model.import={target!r} must read 'package.module:callable'."
        for key in sorted(set(model) - {"import", "args"}):
            yield (
                f"model.{key}",
                f"model.{key} does not go beside import; arguments of the callable go in args.",
            )
        if not isinstance(model.get("args", {}), dict):
            yield "model.args", f"model.args={model['args']!r} must be a mapping of the callable's arguments."
    elif task == "classification":
        yield "task", "task=classification needs a torch model: model: {import: 'package.module:callable'}."
