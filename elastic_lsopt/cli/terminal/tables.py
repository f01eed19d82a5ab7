"""The tables of a job on several world sizes, as `validate` and `plan` print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.estimate.job import OnWorld
from elastic_lsopt.training.estimate.size import ModelSize

WIDEST = 1000
"""Characters of a line in a file."""
UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def console_of_tables() -> Console:
    """Standard output, as wide as it is on a terminal; a file or a pipe takes a line of any length."""
    made = Console(soft_wrap=True, highlight=False)
    return made if made.is_terminal else Console(soft_wrap=True, highlight=False, width=WIDEST)


def table(console: Console, title: str, columns: Sequence[str]) -> Table:
    """A table with lines on a terminal, aligned plain text elsewhere."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD if console.is_terminal else None
    )
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def rank_name(world: int, config: TrainConfig) -> str:
    """The world's size, with a star where the file starts so many workers."""
    return f"{world}*" if world == config.workers else str(world)


def memory_table(console: Console, config: TrainConfig, ours: Sequence[OnWorld]) -> Table:
    """The device's memory by part: what is kept, what a pass and a step add, and the peak."""
    unit, unit_bytes = unit_of(max(one.memory.peak for one in ours))
    made = table(console, f"Memory per rank, in {unit}", ["ranks", *_ranks(config, ours)])
    sections = (
        ("kept", "kept"), ("in_pass", "in a pass"), ("in_step", "in the step"), ("in_probe", "in a probe"),
        ("in_exchange", "in an exchange"),
    )  # fmt: skip
    for number, (name, said) in enumerate(sections):
        columns = [getattr(one.memory, name) for one in ours]
        _rows(made, columns, unit_bytes)
        if number and any(columns):
            made.add_row(said, *_cells([sum(column.values()) for column in columns], unit_bytes), style="dim")
        made.add_section()
    made.add_row("peak", *_cells([one.memory.peak for one in ours], unit_bytes), style="bold")
    return made


def host_table(console: Console, config: TrainConfig, ours: Sequence[OnWorld]) -> Table:
    """The host's memory: for what is offloaded, and for an elastic job's versions of its state."""
    sums = [one.offloaded.peak + sum(one.host.values()) for one in ours]
    unit, unit_bytes = unit_of(max(sums, default=0))
    made = table(console, f"Host memory per rank, in {unit}", ["ranks", *_ranks(config, ours)])
    _rows(made, [one.offloaded.kept for one in ours], unit_bytes)
    a_while = [one.offloaded.peak - sum(one.offloaded.kept.values()) for one in ours]
    _rows(made, [{"in a pass or step": size} for size in a_while], unit_bytes)
    _rows(made, [one.host for one in ours], unit_bytes, zeros=True)
    made.add_row("sum", *_cells(sums, unit_bytes), style="bold")
    return made


def uses_host(ours: Sequence[OnWorld]) -> bool:
    """Whether the job keeps something in host memory."""
    return any(one.host or one.offloaded.peak for one in ours)


def said_of_size(size: ModelSize) -> str:
    """How many parameters are trained, and of how many where some are frozen."""
    of_all = f" of {size.elements:,}" if size.frozen else ""
    return f"{size.parameters:,} trainable parameters{of_all}"


def unit_of(most_bytes: int) -> tuple[str, int]:
    """The unit in which so many bytes read well."""
    return next((name, size) for name, size in UNITS if most_bytes >= size or size == UNITS[-1][1])


def _rows(made: Table, columns: Sequence[Mapping[str, int]], unit_bytes: int, *, zeros: bool = False) -> None:
    for what in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(what, 0) for column in columns]
        if zeros or any(values):
            made.add_row(what, *_cells(values, unit_bytes))


def _cells(values: Sequence[int], unit_bytes: int) -> list[str]:
    return [f"{value / unit_bytes:,.2f}" for value in values]


def _ranks(config: TrainConfig, ours: Sequence[OnWorld]) -> list[str]:
    return [rank_name(one.world, config) for one in ours]
