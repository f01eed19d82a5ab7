"""`elastic-lsopt validate FILE.yaml`: is the job right, how is its batch cut, and what does a rank's memory hold.

Of an elastic job also what its policy makes of each world, and the host memory of the mirror.

Neither a GPU nor the data is touched: the model is built on the meta device, which has shapes and no storage. A model
that is code of the user's own is built only if `trust` says so; without it the tables of memory are left out.
"""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elastic_lsopt.cli.job_file import Job, read_job
from elastic_lsopt.cli.terminal.tables import (
    console_of_tables,
    host_table,
    memory_table,
    rank_name,
    said_of_size,
    table,
    uses_host,
)
from elastic_lsopt.config.deepspeed_json import read_deepspeed_json, zero_stage
from elastic_lsopt.config.settings import (
    ADAMS,
    BUILTIN_DATASETS,
    SettingError,
    TrainConfig,
    batch_sizes,
    in_halves,
    lr_rule,
    ranks_that_share,
)
from elastic_lsopt.elastic.worker.open_files import too_few
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import microbatches_of_rank, part_bounds, slots, unit_sizes
from elastic_lsopt.plan import Plan, Policy, Worker, plan
from elastic_lsopt.training.building.imported_model import foreign_code
from elastic_lsopt.training.estimate.job import on_world
from elastic_lsopt.training.estimate.look import look_at_model
from elastic_lsopt.training.estimate.replicas import one_replica, replicas_of
from elastic_lsopt.training.pace import batches_told, refuse_parts

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
    replicas = replicas_of(job.config)
    with job.file.located():
        check_paths(job.config)
        one = replace(job, config=one_replica(job.config))
        cut = _cut(one)
        plans = _plans(job)
        code = {} if trust else foreign_code(job.config)
        looked = look_at_model(job.config, job.method) if "model.import" not in code else None
    each = 2 if in_halves(job.config) else 1  # what divides the ranks of a replica
    worlds = [w for w in sorted({*WORLDS, job.config.workers}) if w % (each * replicas) == 0] or [each * replicas]
    console = console_of_tables()
    parameters = f"{said_of_size(looked.size)}, " if looked is not None else ""
    console.print(f"{path}: {job.config.task}, {parameters}backend {_backend(job.config)}")
    if not any(key.startswith("landscape") for key in code):
        console.print(f"{job.method!r}: {(type(job.method).__doc__ or '').strip().splitlines()[0]}", markup=False)
    if replicas > 1:
        console.print(f"{replicas} replicas, each on as many of the job's ranks: the tables are of one of them.")
    console.print(_batch_table(console, one.config, cut, [w // replicas for w in worlds]))
    run = [made.world for made in plans] or worlds  # an elastic job's policy may refuse others
    run = [world for world in run if world % (job.config.fsdp_replicas * replicas) == 0]
    ours = [] if looked is None else [on_world(job.config, looked, w, parts=job.method.parts) for w in run]
    if ours:
        console.print(memory_table(console, job.config, ours))
        if uses_host(ours):
            console.print(host_table(console, job.config, ours))
    if job.config.elastic is not None:
        console.print(_plan_table(console, job.config, plans))
        for made in (made for made in plans if made.why):
            console.print(f" {made.world} ranks: {made.why}")
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = job.config.elastic.max_nodes * job.config.workers
        if wrong := too_few(most, limit, deepspeed=job.config.deepspeed is not None):
            console.print(f"{job.config.elastic.max_nodes} nodes of {job.config.workers} workers: {wrong}")
    for key, named in code.items():
        unknown = next((v for k, v in UNKNOWN.items() if key.startswith(k)), "what it takes is")
        console.print(f"{named} was not imported, so {unknown} not known: --trust runs it.", markup=False)
    if looked is not None:
        why = (
            f" Activations are not counted: the model cannot run without numbers ({looked.why})." if looked.why else ""
        )
        console.print(f"* = workers of this file. `elastic-lsopt plan` says more.{why}", markup=False)
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

    def forwards(self, ranks: int) -> int:
        """Forwards of each of these ranks in one pass over the global batch, idle ones included."""
        return sum(len(slots(bounds, 0, ranks)) for bounds in self.parts)


def _cut(job: Job) -> Cut:
    config = job.config
    if config.batch_schedule is not None:
        refuse_parts(config, job.method.parts)
    sizes = unit_sizes(max(batch_sizes(config)), config.per_device_train_batch_size)
    try:
        return Cut(sizes, part_bounds(len(sizes), job.method.parts))
    except UserError as error:
        raise SettingError("landscape.parts", str(error)) from None


def _batch_table(console: Console, config: TrainConfig, cut: Cut, worlds: Sequence[int]) -> Table:
    microbatches, varies = len(cut.sizes), len({*batch_sizes(config)}) > 1
    rows = table(
        console,
        f"A step: {batches_told(config)} samples in {'at most ' * varies}{microbatches} micro-batches of {cut.sizes[0]}"
        + (f" (the last of {cut.sizes[-1]})" if cut.sizes[-1] != cut.sizes[0] else "")
        + (f", in {len(cut.parts)} parts" if len(cut.parts) > 1 else ""),
        ["ranks", "micro-batches a rank", "forwards a rank and pass", "idle slots"],
    )
    for world in worlds:
        ranks = ranks_that_share(config, world)
        counts = {len(microbatches_of_rank(microbatches, rank, ranks)) for rank in range(ranks)}
        forwards = cut.forwards(ranks)
        each = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        idle = (forwards * ranks - microbatches) * (world // ranks)
        rows.add_row(rank_name(world, config), each, str(forwards), str(idle))
    return rows


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
    rows = table(
        console,
        f"Elastic: {elastic.min_nodes} to {elastic.max_nodes} nodes, {elastic.policy}{rule}",
        ["ranks", "batch", "forwards", "peak rate", *(["betas"] if adam else []), "weight decay"],
    )
    for made in plans:
        now = made.hyperparameters(SampleClock())
        betas = [", ".join(f"{beta:.4g}" for beta in now.betas)] if adam and now.betas else []
        rows.add_row(
            rank_name(made.world, config), str(now.global_batch_size), str(made.accumulation),
            f"{now.learning_rate:.3g}", *betas, f"{now.weight_decay:.3g}",
        )  # fmt: skip
    return rows
