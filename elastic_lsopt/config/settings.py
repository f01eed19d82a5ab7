"""The one source of the YAML keys, the command line's `key=value`, the Python arguments and the JSON schema.

    TrainConfig(dataset="python-stdlib", output_dir="runs/a", model={...}, max_steps=100)

A field's docstring is its description in the schema, its annotation the range. Keys are Hugging Face's where
it has one. Checks of one value stand in the annotation, checks between values in `conflicts.py`. Nothing here
opens a file: see `load_config` for YAML and lines, `deepspeed_json` for what a DeepSpeed JSON may say.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from elastic_lsopt.config.elastic import ElasticConfig, Rule
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.ranges import (
    IMPORT_PATH,
    SETTINGS,
    BelowOne,
    Count,
    CountOrZero,
    ImportPath,
    Name,
    NotNegative,
    Positive,
    SettingError,
)
from elastic_lsopt.config.schedules import BatchScheduleConfig, LrSchedulerKwargs

LANDSCAPE_SCHEMA: dict[str, Any] = {
    "properties": {"method": {"type": "string"}, "import": {"type": "string", "pattern": IMPORT_PATH}},
    "oneOf": [{"required": ["method"]}, {"required": ["import"]}],
}

ADAMS = ("adam", "adamw")
Optim = Literal[
    "adamw", "adam", "sgd", "adahessian", "adaptive_memory", "lamb", "lars", "muon", "sassha", "schedule_free", "soap",
    "sophia_g", "sophia_h", "adadelta", "adagrad", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop",
]  # fmt: skip
"""Ours, and the element-wise classes of torch.optim; an installed package may bring more names."""
KEYS_OF_OPTIM = {
    "sgd": {"momentum": "momentum"},
    **{name: {"betas": "adam_beta1", "eps": "adam_epsilon"} for name in ADAMS},
}
"""Hyper-parameters that are keys of the job, and so no `optim_args`."""
EVALUATE_ELSEWHERE = frozenset({"schedule_free"})
"""Updates that are an average themselves, by whose name the model is evaluated there."""
DECOUPLED = frozenset({"adahessian", "adamw", "muon", "sassha", "soap", "sophia_g", "sophia_h"})
"""Updates whose decay shrinks the weights themselves."""
BY_FORM = frozenset({"adaptive_memory", "schedule_free"})
"""Updates of which this holds in their form adamw, which is the default, and not in sgd."""
NO_SQUARE_ROOT = frozenset({"adahessian", "adaptive_memory", "sassha", "schedule_free", "sophia_g", "sophia_h"})
"""Updates that no square-root rule is known for: what they divide by is no measure of the gradient's noise as Adam's
is."""

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
    attn_implementation: Name | None = None
    """How attention is computed, as the model offers: sdpa, eager, flash_attention_2 …; null: transformers' choice."""
    tokenizer_name_or_path: Name | None = None
    """A Hugging Face tokenizer folder or name; null: the bytes of the text are the tokens."""
    lora: LoraConfig | None = None
    """Train adapters through peft and leave the model frozen; null: train all of it."""

    # The data.
    dataset: Name
    """A text, jsonl or parquet file or folder, a Hugging Face dataset folder, `python-stdlib` or `digits`."""
    dataset_format: Literal["auto", "text", "chat", "completion"] = "auto"
    """What a record holds, for causal_lm: a text; the messages of a chat, of which the assistant's are trained; a
    prompt, and the completion that is trained; auto: what the first record's fields show."""
    dataset_text_field: Name = "text"
    """The field of a record that holds its text."""
    dataset_label_field: Name = "label"
    """The field of a record that holds its class, for sequence_classification."""
    dataset_messages_field: Name = "messages"
    """The field of a record that holds its chat: a list of {role, content} (or `conversations` of {from, value})."""
    dataset_prompt_field: Name = "prompt"
    """The field of a record that holds its prompt, which is not trained."""
    dataset_completion_field: Name = "completion"
    """The field of a record that holds its completion, which is trained."""
    chat_template: Name | None = None
    """A file with the Jinja template by which chats become text, saved with the model; null: the tokenizer's own."""
    packing: Literal["auto", "none", "concatenate", "documents"] = "auto"
    """How documents become samples: one each; all end to end, cut into blocks; or several whole ones a sample, which do
    not attend to each other; auto: concatenate for text, else none."""
    block_size: Annotated[int, Field(ge=2)] = 128
    """Tokens in a sample (at most, unless packing is concatenate); >= 2."""
    max_bad_records: CountOrZero = 0
    """Records that may be left out because they cannot be used; one more stops the job."""
    eval_fraction: BelowOne = 0.05
    """Share of the documents that is held out for evaluation, in [0, 1); none where there is an eval_dataset."""
    eval_dataset: Name | None = None
    """Data of its own for evaluation, of the same format; null: a share of the dataset."""
    dataset_cache_dir: Name | None = None
    """Where the tokens of a corpus are kept, and mapped from; null: in memory up to 64 MiB, else in Hugging Face's
    cache."""

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
    fsdp_cpu_offload: bool = False
    """FSDP2: keep this rank's shards, gradients and optimizer state in host memory, and step there; a GPU then holds
    only what a forward has gathered, and each gather comes over the bus."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more arithmetic."""

    # The batch and the length of the job.
    per_device_train_batch_size: Count = 8
    """Samples in a micro-batch (one forward); the only batch size that a device feels."""
    global_batch_size: Count = 32
    """Samples in an optimizer step, over all ranks; the same at every world size (but see elastic.policy)."""
    batch_schedule: BatchScheduleConfig | None = None
    """How the samples of a step change along the run; null: they are global_batch_size."""
    max_steps: Count | None = None
    """Optimizer steps of the job at global_batch_size, which say how many samples it is; exactly one of max_steps and
    num_train_epochs."""
    num_train_epochs: Positive | None = None
    """Passes over the training samples, may be a fraction; exactly one of max_steps and num_train_epochs."""

    # The base optimizer and its schedule.
    optim: Optim | Name = "adamw"
    """The base optimizer, which steps with the gradient that the landscape method makes: an update of ours, a class of
    torch.optim that works element by element, a name that an installed package announces, or "package.module:Class"."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own hyper-parameters for which the job has no key, such as trust of lars or nesterov of sgd."""
    param_groups: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Parameters that are treated otherwise, the first that matches: {match: "*.weight", dims: 2, optim: muon,
    learning_rate: 0.02, weight_decay: 0.1, optim_args: {…}}; what is not said, and the rest, is as for the job."""
    averages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Means of the weights that are kept beside them, by name: {ema: {decay: 0.999}}."""
    evaluate_average: Name | None = None
    """The average at which the held-out loss is measured and the model exported; null: the weights themselves."""
    learning_rate: NotNegative = 5e-5
    """Peak learning rate; >= 0."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt", "autodrop"] = (
        "linear"
    )
    """The learning rate after the warm-up: constant; down to 0 at the last sample; constant, then down over the last
    samples; with the root of the samples; or lowered whenever the weights only turn about (autodrop)."""
    lr_scheduler_kwargs: LrSchedulerKwargs | None = None
    """What warmup_stable_decay, inverse_sqrt and autodrop have of their own; null: their defaults."""
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
    """The landscape method (none, sam, lpf_sgd, functional_sam … a registered name, or import: a class of your own) and
    its fields."""
    landscape_space: Literal["trained", "merged"] = "trained"
    """What the method moves: the trained parameters; or, of flat_lora, the weights that adapters are merged into."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, sample order, dropout and noise; the world size has no part in any of them."""
    elastic: ElasticConfig | None = None
    """Nodes that come and go in mid-training; null: a job of fixed size."""
    consensus: dict[str, Any] | None = None
    """Replicas that take their own steps and pull on each other every tau of them: {rule: grawa, replicas: 4, tau: 32}
    with the rule's own hyper-parameters, `exchange` ({bits: 8} or {top_k: 64}), `exchange_timeout_s` and `steps`
    (by_size, by_speed); null: one model, whose every step is of all ranks."""

    # What is measured.
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is measured of the landscape on the way, by name: {every_steps: 100} or {every_samples: …}, `budget` (share
    of the time, 0.1), `units` (4), `products` (auto), `measure` (the name), and the measure's own settings."""

    # Evaluation, checkpoints, reports.
    eval_steps: Count | None = None
    """Optimizer steps between evaluations; null: only at the end."""
    eval_batches: Count | None = None
    """Micro-batches of per_device_train_batch_size samples in an evaluation; null: all that is held out."""
    compute_metrics: ImportPath | None = None
    """A function of your own for classification, as Hugging Face's Trainer takes it: of an EvalPrediction with the
    predictions and label_ids of all that is held out, to {name: number}."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints; null: only at the end."""
    save_total_limit: Count | None = None
    """Checkpoints to keep, the newest; null: all. One more stays until a step has shown that the newest is good."""
    resume_from_checkpoint: Name = "auto"
    """`auto`: the newest good checkpoint of output_dir, if any; `none`: start anew; or a path."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Field(strict=False)] = ()
    """Reporters beside metrics.jsonl, which is always written; each must be installed."""

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
    """Exit code of a job, or of a node of an elastic job, that a signal has stopped before the job's end; a scheduler
    can start it again by it (see launch/)."""

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
        from elastic_lsopt.config.conflicts import conflicts  # which reads the fields above

        for key, message in conflicts(self):
            raise SettingError(key, message)


def landscape_fields(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """The name or import path of the landscape method, and the fields that its dataclass takes."""
    own = dict(config.landscape)
    return own.pop("method") if "method" in own else own.pop("import"), own


def in_halves(config: TrainConfig) -> bool:
    """Whether the landscape method parts the ranks into halves, which run the same micro-batches."""
    return config.landscape.get("halves") is True


def ranks_that_share(config: TrainConfig, world: int) -> int:
    """Among how many of the job's ranks a step's micro-batches are dealt: all, or those of one half."""
    return world // 2 if in_halves(config) else world


def batch_sizes(config: TrainConfig) -> tuple[int, ...]:
    """The global batches that bound those of the job's steps, the first one first."""
    block, own = config.batch_schedule, config.global_batch_size
    return (own,) if block is None else block.sizes(own)


def lr_rule(config: TrainConfig, block: ElasticConfig | BatchScheduleConfig) -> Rule:
    """The rule by which the rate follows the batch: the one that is named, else that of the optimizer's paper."""
    return block.lr_rule or ("linear" if config.optim in ("sgd", "lars") else "sqrt")
