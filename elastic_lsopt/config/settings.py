"""The one source of the YAML keys, the command line's `key=value`, the Python arguments and the JSON schema.

    TrainConfig(dataset="python-stdlib", output_dir="runs/a", model={...}, max_steps=100)

A field's docstring is its description in the schema, its annotation the range. Keys are Hugging Face's where
it has one. Checks of one value stand in the annotation, checks between values in `_conflicts`. Nothing here
opens a file: see `load_config` for YAML and lines, `deepspeed_json` for what a DeepSpeed JSON may say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from elastic_lsopt.config.elastic import ElasticConfig, Rule
from elastic_lsopt.config.probes import read_probes
from elastic_lsopt.config.ranges import (
    IMPORT_PATH,
    SETTINGS,
    BelowOne,
    Count,
    ImportPath,
    Name,
    NotNegative,
    Positive,
    SettingError,
)

LANDSCAPE_SCHEMA: dict[str, Any] = {
    "properties": {"method": {"type": "string"}, "import": {"type": "string", "pattern": IMPORT_PATH}},
    "oneOf": [{"required": ["method"]}, {"required": ["import"]}],
}

ADAMS, TORCH_OPTIMS = ("adam", "adamw"), ("adam", "adamw", "sgd")

# Data that comes with Python or with scikit-learn: names, never paths.
BUILTIN_DATASETS = ("python-stdlib", "digits")
MOST_MICROBATCHES, MOST_WORKERS = 1_000_000, 4096
"""Of a step, and of a machine: what is far beyond them is a slip of the pen, and would only fill the memory."""

# Keys that a reader of other trainers' files may expect, and why they are refused.
REFUSED = {
    "fp16": "loss scaling is refused: use bf16: true",
    "gradient_accumulation_steps": "accumulation follows from global_batch_size, "
    "per_device_train_batch_size and the world size; remove the key",
    "gradient_checkpointing": "the key is activation_checkpointing",
    "optimizer": "the base optimizer is `optim`, the landscape method `landscape: {method: ...}`",
}


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class TrainConfig:
    """One training job.

    Raises pydantic's ValidationError (a ValueError) when made in Python; `load_config` turns that into a
    one-line UserError with the file and the line.
    """

    # The model: exactly one of the first two.
    model_name_or_path: Name | None = None
    """A Hugging Face model folder, or a name in the local Hugging Face cache."""
    model: dict[str, Any] | None = None
    """A model from scratch: a Hugging Face config with `model_type`, or {import: "package.module:callable",
    args: {...}} for any torch model."""
    task: Literal["causal_lm", "sequence_classification", "classification"] = "causal_lm"
    """What is learnt; `classification` is a plain torch model on pairs (x, y)."""
    tokenizer_name_or_path: Name | None = None
    """A Hugging Face tokenizer folder or name; null: the bytes of the text are the tokens."""

    # The data.
    dataset: Name
    """A text or jsonl file or folder, a Hugging Face dataset folder, `python-stdlib` or `digits`."""
    dataset_text_field: Name = "text"
    """The field of a record that holds its text."""
    dataset_label_field: Name = "label"
    """The field of a record that holds its class, for sequence_classification."""
    block_size: Annotated[int, Field(ge=2)] = 128
    """Tokens in a sample; >= 2."""
    eval_fraction: BelowOne = 0.05
    """Share of the documents that is held out for evaluation, in [0, 1)."""

    # Where it runs, and where it writes.
    output_dir: Name
    """The run folder: resolved config, metrics, checkpoints, pictures, exported model."""
    backend: Literal["replicated", "fsdp2", "deepspeed"] = "replicated"
    """Where the weights lie: whole on each rank, in FSDP2 shards, or with DeepSpeed (ZeRO 0 to 3)."""
    deepspeed: Name | dict[str, Any] | None = None
    """The DeepSpeed JSON, a path or the mapping itself; for backend deepspeed only."""
    workers: Count = 1
    """Processes to start where no launcher did; ignored under torchrun, deepspeed, mpirun or Slurm."""
    fsdp_replicas: Count = 1
    """Replica groups of a hybrid-sharded FSDP2 mesh; 1: shard over all ranks."""
    fsdp_reshard_after_forward: bool | Count = True
    """FSDP2: free gathered weights after a forward (true), keep them (false), reshard to that many ranks."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more arithmetic."""

    # The batch and the length of the job.
    per_device_train_batch_size: Count = 8
    """Samples in a micro-batch (one forward); the only batch size that a device feels."""
    global_batch_size: Count = 32
    """Samples in an optimizer step, over all ranks; the same at every world size (but see elastic.policy)."""
    max_steps: Count | None = None
    """Optimizer steps of the job, at global_batch_size; exactly one of max_steps and num_train_epochs."""
    num_train_epochs: Positive | None = None
    """Passes over the training samples, may be a fraction; exactly one of max_steps and num_train_epochs."""

    # The base optimizer and its schedule.
    optim: Literal["adamw", "adam", "sgd", "lamb", "lars", "muon"] | ImportPath = "adamw"
    """The base optimizer, which steps with the gradient that the landscape method makes; or an update of your own."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """The own hyper-parameters of lamb, lars, muon or of an imported update, such as trust."""
    param_groups: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Parameters that are treated otherwise, the first that matches: {match: "*.weight", dims: 2, optim: muon,
    learning_rate: 0.02, weight_decay: 0.1, optim_args: {…}}; what is not said, and the rest, is as for the job."""
    averages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Means of the weights that are kept beside them, by name: {ema: {decay: 0.999}}."""
    evaluate_average: Name | None = None
    """The average at which the held-out loss is measured and the model exported; null: the weights themselves."""
    learning_rate: NotNegative = 5e-5
    """Peak learning rate; >= 0."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate after the warm-up: constant, or down to 0 at the last sample."""
    warmup_ratio: BelowOne = 0.0
    """Share of the job's samples over which the learning rate rises from 0, in [0, 1)."""
    max_grad_norm: NotNegative = 1.0
    """Limit of the global L2 norm of the installed gradient; 0: no clipping."""
    weight_decay: NotNegative = 0.0
    """Decoupled for adamw, added to the gradient for adam and sgd."""
    adam_beta1: BelowOne = 0.9
    """Decay of Adam's first moment, in [0, 1)."""
    adam_beta2: BelowOne = 0.999
    """Decay of Adam's second moment, in [0, 1)."""
    adam_epsilon: Positive = 1e-8
    """Added to Adam's denominator; > 0."""
    momentum: BelowOne = 0.0
    """Momentum of sgd, in [0, 1)."""
    landscape: Annotated[dict[str, Any], Field(json_schema_extra=LANDSCAPE_SCHEMA)] = field(
        default_factory=lambda: {"method": "none"}
    )
    """The landscape method (none, sam, asam, lpf_sgd, a registered name, or import: a class of your own) and its
    fields."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, sample order, dropout and noise; the world size has no part in any of them."""
    elastic: ElasticConfig | None = None
    """Nodes that come and go in mid-training; null: a job of fixed size."""

    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is measured of the landscape on the way, by name: {every_steps: 100} or {every_samples: …}, `budget` (share
    of the time, 0.1), `units` (4), `products` (auto), `measure` (the name), and the measure's own settings."""

    # Evaluation, checkpoints, reports.
    eval_steps: Count | None = None
    """Optimizer steps between evaluations; null: only at the end."""
    eval_batches: Count | None = None
    """Micro-batches of per_device_train_batch_size samples in an evaluation; null: all that is held out."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints; null: only at the end."""
    save_total_limit: Count | None = None
    """Checkpoints to keep, the newest; null: all. One more stays until a step has shown that the newest is good."""
    resume_from_checkpoint: Name = "auto"
    """`auto`: the newest good checkpoint of output_dir, if any; `none`: start anew; or a path."""
    report_to: Annotated[tuple[Literal["tensorboard"], ...], Field(strict=False)] = ()
    """Reporters beside metrics.jsonl, which is always written."""

    # When steps cannot be taken, and when the job is told to stop.
    max_skipped_steps: Count = 10
    """Steps in a row, with a loss or gradient that is not finite, after which the job has diverged; they change no
    weight, and no checkpoint is committed or deleted meanwhile."""
    on_divergence: Literal["stop", "rewind"] = "stop"
    """stop: end with an error; rewind: back to the last good checkpoint (save_steps), at a lower rate and with another
    order of the samples that are left."""
    rewind_lr_factor: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.5
    """Factor on the learning rate for each rewind; in (0, 1]."""
    max_rewinds: Count = 3
    """Rewinds of a job after which a further divergence ends it."""
    exit_code_when_stopped: Annotated[int, Field(ge=0, le=255, strict=True)] = 0
    """Exit code of a job that a signal has stopped before its end; a scheduler can requeue by it (see launch/)."""

    export: bool = True
    """Write the trained model at the end: a Hugging Face folder, safetensors for a torch model."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, given: Any) -> Any:
        keys = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        for key in keys:
            if key in REFUSED:
                raise SettingError(key, f"{key}: {REFUSED[key]}.")
        return given

    def __post_init__(self) -> None:
        for key, message in _conflicts(self):
            raise SettingError(key, message)


def landscape_fields(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """The name or import path of the landscape method, and the fields that its dataclass takes."""
    own = dict(config.landscape)
    return own.pop("method") if "method" in own else own.pop("import"), own


def lr_rule(config: TrainConfig, elastic: ElasticConfig) -> Rule:
    """The rule by which the rate follows the batch: the one that is named, else that of the optimizer's paper."""
    return elastic.lr_rule or ("linear" if config.optim in ("sgd", "lars") else "sqrt")


def _conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    """What single ranges cannot say: (key, message) of the values that contradict each other."""
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
        for key, default in (("fsdp_replicas", 1), ("fsdp_reshard_after_forward", True)):
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
    if c.optim_args and c.optim in TORCH_OPTIMS:
        yield (
            "optim_args",
            f"optim_args are for lamb, lars, muon or an import path, but optim={c.optim}; remove the key.",
        )
    if c.evaluate_average is not None and c.evaluate_average not in c.averages:
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
    read_probes(c.probes)
    if ("method" in c.landscape) == ("import" in c.landscape) or not isinstance(landscape_fields(c)[0], str):
        yield (
            "landscape",
            "landscape needs `method`, a name such as none, sam, asam or lpf_sgd, or `import`: 'package.module:Class'.",
        )
    if c.elastic is not None:
        yield from _elastic_conflicts(c, c.elastic)


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
    if lr_rule(c, e) == "adascale" and c.optim != "sgd":
        yield (
            "elastic.lr_rule",
            f"lr_rule=adascale is for optim sgd, whose step is the gradient that it measures, but optim={c.optim}; "
            "use sqrt.",
        )
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
