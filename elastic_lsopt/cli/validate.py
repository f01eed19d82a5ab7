"""`elastic-lsopt validate FILE.yaml`: is the job right, how is its batch cut, and what does a rank's memory hold.

Of an elastic job also what its policy makes of each world, and the host memory of the mirror.

Neither a GPU nor the data is touched: the model is built on the meta device, which has shapes and no storage. A model
that is code of the user's own is built only if `trust` says so; without it the tables of memory are left out.
"""

import os
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from elastic_lsopt.cli.job_file import Job, read_job
from elastic_lsopt.config.deepspeed_json import read_deepspeed_json, zero_stage
from elastic_lsopt.config.import_paths import import_paths
from elastic_lsopt.config.settings import ADAMS, BUILTIN_DATASETS, SettingError, TrainConfig, landscape_fields, lr_rule
from elastic_lsopt.elastic.worker.open_files import too_few
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import microbatches_of_rank, part_bounds, slots, unit_sizes
from elastic_lsopt.plan import Plan, Policy, Worker, plan
from elastic_lsopt.training.building.base_optimizer import base_of
from elastic_lsopt.training.building.imported_model import foreign_code
from elastic_lsopt.training.memory import memory_per_rank, mirror_per_rank

WORLDS = (1, 2, 4, 8)
UNKNOWN = {
    "model": "the model's size, and memory, are", "landscape": "the method's parts (1 is taken) are",
    "probes": "its settings are", "optim": "its hyper-parameters are", "param_groups[": "its hyper-parameters are",
    "averages": "its hyper-parameters are", "compute_metrics": "its numbers are",
}  # fmt: skip
"""What a table lacks where code of the user's was not run."""
MOST_SHOWN = 64
"""Ranks of the largest world whose plan is shown."""


def validate(path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> int:
    """Check a job and print its batch arithmetic and its memory per rank; returns the exit code 0.

    `trust` lets it import the code that the file names as its model. Raises UserError, one line with the place, for
    whatever is wrong.
    """
    job = read_job(path, overrides, imports=trust)
    with job.file.located():
        check_paths(job.config)
        cut = _cut(job)
        plans = _plans(job)
        code = {} if trust else foreign_code(job.config)
        size = _model_size(job.config) if "model.import" not in code else None
    worlds = sorted({*WORLDS, job.config.workers})
    console = Console(soft_wrap=True, highlight=False)
    parameters = f"{size.parameters:,} trainable parameters, " if size is not None else ""
    console.print(f"{path}: {job.config.task}, {parameters}backend {_backend(job.config)}")
    if not any(key.startswith("landscape") for key in code):
        console.print(f"{job.method!r}: {(type(job.method).__doc__ or '').strip().splitlines()[0]}", markup=False)
    console.print(_batch_table(console, job.config, cut, worlds))
    if size is not None:
        console.print(_memory_table(console, job.config, size, worlds))
    if job.config.elastic is not None:
        console.print(_plan_table(console, job.config, plans))
        for made in (made for made in plans if made.why):
            console.print(f" {made.world} ranks: {made.why}")
        if size is not None:
            console.print(_mirror_table(console, job.config, size, plans))
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = job.config.elastic.max_nodes * job.config.workers
        if wrong := too_few(most, limit, deepspeed=job.config.deepspeed is not None):
            console.print(f"{job.config.elastic.max_nodes} nodes of {job.config.workers} workers: {wrong}")
    for key, named in code.items():
        unknown = next((v for k, v in UNKNOWN.items() if key.startswith(k)), "what it takes is")
        console.print(f"{named} was not imported, so {unknown} not known: --trust runs it.", markup=False)
    if size is not None:
        console.print("Activations, communication buckets and the framework are not counted; * = workers of this file.")
    console.print(f"{path} is right.")
    return 0


def check_paths(config: TrainConfig) -> None:
    """Refuse what looks like a path and is not there, before a library asks the network for a name of that kind."""
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        named = getattr(config, key)
        looks_like_path = named is not None and (named[0] in "./~" or named.count("/") > 1)
        if named is not None and looks_like_path and not Path(named).expanduser().exists():
            raise SettingError(key, f"{key}={named} does not exist; give a folder or a name in the local cache.")
    for key in ("dataset", "eval_dataset"):
        named = getattr(config, key)
        if named is None or named in BUILTIN_DATASETS:
            continue
        looks_like_path = Path(named).suffix or named.startswith((".", "/", "~"))
        if looks_like_path and not Path(named).expanduser().exists():
            raise SettingError(key, f"{key}={named} does not exist; give a file, a folder or a name.")
    if config.chat_template is not None and not Path(config.chat_template).expanduser().is_file():
        raise SettingError("chat_template", f"chat_template={config.chat_template} is no file.")
    resume = config.resume_from_checkpoint
    if resume not in ("auto", "none") and not Path(resume).exists():
        raise SettingError(
            "resume_from_checkpoint", f"resume_from_checkpoint={resume} does not exist; give a path, auto or none."
        )
    out = Path(config.output_dir).absolute()
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingError("output_dir", f"output_dir={config.output_dir}: {parent} is not a folder to write to.")


def _backend(config: TrainConfig) -> str:
    return config.backend if config.deepspeed is None else f"deepspeed, ZeRO stage {_stage(config)}"


def _stage(config: TrainConfig) -> int:
    return 0 if config.deepspeed is None else zero_stage(read_deepspeed_json(config.deepspeed))


# -- the batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A step's micro-batches and the bounds of the method's parts."""

    sizes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]

    def forwards(self, world: int) -> int:
        """Forwards of each rank in one pass over the global batch, idle ones included."""
        return sum(len(slots(bounds, 0, world)) for bounds in self.parts)


def _cut(job: Job) -> Cut:
    config = job.config
    sizes = unit_sizes(config.global_batch_size, config.per_device_train_batch_size)
    try:
        return Cut(sizes, part_bounds(len(sizes), job.method.parts))
    except UserError as error:
        raise SettingError("landscape.parts", str(error)) from None


def _batch_table(console: Console, config: TrainConfig, cut: Cut, worlds: Sequence[int]) -> Table:
    microbatches = len(cut.sizes)
    table = _table(
        console,
        f"A step: {config.global_batch_size} samples in {microbatches} micro-batches of {cut.sizes[0]}"
        + (f" (the last of {cut.sizes[-1]})" if cut.sizes[-1] != cut.sizes[0] else "")
        + (f", in {len(cut.parts)} parts" if len(cut.parts) > 1 else ""),
        ["ranks", "micro-batches a rank", "forwards a rank and pass", "idle slots"],
    )
    for world in worlds:
        counts = {len(microbatches_of_rank(microbatches, rank, world)) for rank in range(world)}
        forwards = cut.forwards(world)
        each = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        table.add_row(_rank_name(world, config), each, str(forwards), str(forwards * world - microbatches))
    return table


# -- the memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """Trainable elements, and those that are whole at once where the weights are sharded."""

    parameters: int
    gathered: int


def _model_size(config: TrainConfig) -> ModelSize:
    from elastic_lsopt.training.building.models import blocks, build_model  # transformers: seconds to import

    model = build_model(config, device="meta")
    if not any(key.startswith(("optim", "param_groups")) for key, _ in import_paths(config)):
        base_of(config, model)  # a rule of param_groups that no parameter takes
    parameters = _elements(model)
    if config.fsdp_reshard_after_forward is False:
        return ModelSize(parameters, parameters)
    sizes = [_elements(block) for block in blocks(model)]
    # What belongs to no block (embeddings, head) stays gathered from the first forward to the end of the backward.
    return ModelSize(parameters, parameters - sum(sizes) + max(sizes, default=0))


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _memory_table(console: Console, config: TrainConfig, size: ModelSize, worlds: Iterable[int]) -> Table:
    worlds = [world for world in worlds if world % config.fsdp_replicas == 0]
    columns = [
        memory_per_rank(
            size.parameters,
            backend=config.backend,
            world=world,
            stage=_stage(config),
            bf16=config.bf16,
            optim=config.optim,
            momentum=config.momentum,
            method=landscape_fields(config)[0],
            gathered=size.gathered,
            replicas=config.fsdp_replicas,
            averages=len(config.averages),
        )
        for world in worlds
    ]
    ranks = [f"{_rank_name(world, config)} rank{'s' if world > 1 else ''}" for world in worlds]
    unit, unit_bytes = _unit(max(sum(column.values()) for column in columns))
    table = _table(console, f"Memory a rank, in {unit}", ["for", *ranks])
    for what in columns[0]:
        if any(column[what] for column in columns):
            table.add_row(what, *(f"{column[what] / unit_bytes:,.2f}" for column in columns))
    table.add_row("sum", *(f"{sum(column.values()) / unit_bytes:,.2f}" for column in columns), style="bold")
    return table


def _unit(most_bytes: int) -> tuple[str, int]:
    return next(
        (name, size)
        for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
        if most_bytes >= size or size == 2**10
    )


# -- elastic jobs ------------------------------------------------------------------------------------------------------


def _plans(job: Job) -> list[Plan]:
    """The plan at each world that the job may have, as if it began there; none for a job of fixed size."""
    elastic = job.config.elastic
    if elastic is None:
        return []
    least, most = (nodes * job.config.workers for nodes in (elastic.min_nodes, elastic.max_nodes))
    others = (*WORLDS, elastic.reference_workers or least, min(most, MOST_SHOWN))
    worlds = {least, *(world for world in others if least <= world <= most)}
    try:
        policy = Policy.of(job.config, parts=job.method.parts)
        return [plan([Worker(r, "") for r in range(world)], policy, SampleClock()) for world in sorted(worlds)]
    except UserError as error:
        raise SettingError("elastic", str(error)) from None


def _plan_table(console: Console, config: TrainConfig, plans: Sequence[Plan]) -> Table:
    elastic = config.elastic
    assert elastic is not None
    rule = f", lr_rule {lr_rule(config, elastic)}" if elastic.policy == "scale_batch" else ""
    adam = config.optim in ADAMS
    table = _table(
        console,
        f"Elastic: {elastic.min_nodes} to {elastic.max_nodes} nodes, {elastic.policy}{rule}",
        ["ranks", "batch", "forwards", "peak rate", *(["betas"] if adam else []), "weight decay"],
    )
    for made in plans:
        now = made.hyperparameters(SampleClock())
        betas = [", ".join(f"{beta:.4g}" for beta in now.betas)] if adam and now.betas else []
        table.add_row(
            _rank_name(made.world, config), str(now.global_batch_size), str(made.accumulation),
            f"{now.learning_rate:.3g}", *betas, f"{now.weight_decay:.3g}",
        )  # fmt: skip
    return table


def _mirror_table(console: Console, config: TrainConfig, size: ModelSize, plans: Sequence[Plan]) -> Table:
    elastic = config.elastic
    assert elastic is not None
    worlds = [made.world for made in plans if made.world % config.fsdp_replicas == 0]
    columns = [
        mirror_per_rank(
            size.parameters,
            backend=config.backend,
            world=world,
            stage=_stage(config),
            optim=config.optim,
            momentum=config.momentum,
            vectors=len(config.averages) + (elastic.policy == "scale_batch" and lr_rule(config, elastic) == "adascale"),
            copies=elastic.copies,
            replicas=config.fsdp_replicas,
            budget_bytes=elastic.mirror_gib * 2**30,
        )
        for world in worlds
    ]
    unit, unit_bytes = _unit(max((sum(column.values()) for column in columns), default=0))
    ranks = [f"{_rank_name(world, config)} rank{'s' if world > 1 else ''}" for world in worlds]
    table = _table(console, f"Host memory a rank, for versions of the state, in {unit}", ["for", *ranks])
    for what in columns[0] if columns else ():
        table.add_row(what, *(f"{column[what] / unit_bytes:,.2f}" for column in columns))
    table.add_row("sum", *(f"{sum(column.values()) / unit_bytes:,.2f}" for column in columns), style="bold")
    return table


# -- on paper ----------------------------------------------------------------------------------------------------------


def _rank_name(world: int, config: TrainConfig) -> str:
    return f"{world}*" if world == config.workers else str(world)


def _table(console: Console, title: str, columns: Sequence[str]) -> Table:
    """A table with lines on a terminal, aligned plain text elsewhere."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD if console.is_terminal else None
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
