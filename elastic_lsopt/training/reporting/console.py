"""What a person sees while a job runs: a few lines, and a progress bar on a terminal. Rank 0 alone speaks."""

from __future__ import annotations

import logging
import resource
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.base_optimizer import name_of_base
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.training.pace import batches_told

LINE_EVERY_S = 10.0
"""Without a terminal, a line of progress about so often."""
CLEAR_LINE = "\r\x1b[2K"


class Console:
    """`say` a line, `step` a step; a context manager around the steps, which ends the bar. Silent until `attend`.

    The package's own warnings are said here as well, above the bar; other ranks' are not, because they are the same. In
    an elastic job a process has one console for its life, and attends anew in each generation: rank 0 may be another.
    """

    def __init__(self) -> None:
        self._speaks, self._steps = False, 0
        self._terminal = Terminal(stderr=True, soft_wrap=True, highlight=False)
        self._device = torch.device("cpu")
        self._bar: Progress | None = None
        self._task: Any = None
        self._eval_loss: float | None = None
        self._accuracy: float | None = None
        self._speed, self._per_sample = Speed(), ("samples", 1)
        self._said, self._introduced = 0.0, False
        log = logging.getLogger("elastic_lsopt")
        log.handlers, log.propagate = [_Lines(self)], False

    def attend(self, *, speaks: bool, steps: int, done: int) -> None:
        """From now on this process speaks for the job, or not; `done` of its `steps` steps are behind it."""
        self._speaks, self._steps = speaks, steps
        if not speaks or not self._terminal.is_terminal:
            return
        if self._bar is None:
            self._terminal.file.write(CLEAR_LINE)  # of the bar that a dead rank 0 has left
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("<"),
                TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=self._terminal,
            )  # fmt: skip
            self._task = self._bar.add_task("", told="")
        self._bar.update(self._task, total=steps, completed=done)
        self._bar.live.transient = False
        self._bar.start()

    def lead(self, speaks: bool) -> None:
        """This process speaks for the job from now on, or not: before anything is built, whose warnings count too."""
        self._speaks = speaks

    def say(self, text: str) -> None:
        """One line, as it is."""
        if self._speaks:
            self._terminal.print(text, markup=False)

    def introduce(self, config: TrainConfig, engine: Engine, data: Data) -> None:
        """The first lines: what is trained, on what, how; once a process."""
        if config.task == "causal_lm":
            self._per_sample = "tokens", config.block_size
        self._device = engine.backend.device
        if self._introduced:
            return
        self._introduced = True
        backend, ranks = engine.backend, engine.backend.world
        self.say(
            f"{type(engine.module).__name__.removeprefix('FSDP')}, {engine.space.layout.numel:,} trainable parameters; "
            f"{backend.name} on {ranks} {backend.compute_device.type} rank{'s' if ranks > 1 else ''}; "
            f"{engine.method!r} over {name_of_base(engine.base)}"
        )
        self.say(
            f"{config.dataset}: {len(data.train):,} training and {len(data.eval):,} held-out samples; "
            f"{self._steps:,} steps of {batches_told(config)}"
        )
        for note in data.notes:
            self.say(f"note: {note}")
        if data.bigram_entropy is not None:
            self.say(f"byte-bigram entropy of the corpus: {data.bigram_entropy:.4f} nats a byte")
        if engine.clock.steps >= self._steps:
            self.say("all steps are done; raise max_steps or num_train_epochs to train on")

    def step(self, row: dict[str, Any], *, steps: int | None = None, samples_left: int | None = None) -> None:
        """Show one step's row of metrics.jsonl; the job has so many steps and samples before it, where the batch does
        not stay as it is."""
        if not self._speaks:
            return
        self._steps = self._steps if steps is None else steps
        self._eval_loss = row.get("eval_loss", self._eval_loss)
        self._accuracy = row.get("eval_accuracy", self._accuracy)
        told = f"loss {row['loss']:.3f}" + (f"  held out {self._eval_loss:.3f}" if self._eval_loss is not None else "")
        told += f"  accuracy {self._accuracy:.3f}" if self._accuracy is not None else ""
        what, each = self._per_sample
        speed = self._speed.after(row["batch"] * each, row["seconds"])
        told += f"  rate {row['lr']:.3g}  batch {row['batch']} on {row['world']}  {counted(speed)} {what}/s"
        told += f"  {memory_in_use(self._device) / 2**30:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, total=self._steps, completed=row["step"], told=told)
            return
        now = time.monotonic()
        if now - self._said > LINE_EVERY_S or "eval_loss" in row or row["step"] == self._steps:
            self._said = now
            samples = (self._steps - row["step"]) * row["batch"] if samples_left is None else samples_left
            left = duration(samples * each / speed) if speed else "?"
            self.say(f"step {row['step']}/{self._steps}  {told}  {row['seconds']:.2f} s a step, {left} left")

    def pause(self) -> None:
        """Take the bar away until `attend`."""
        if self._bar is not None:
            self._bar.live.transient = True
            self._bar.stop()

    def close(self) -> None:
        """The steps are over: the bar stays as it is."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Speed:
    """Tokens or samples a second, smoothed over the last steps: one slow step is no change of speed."""

    SMOOTHING = 0.1

    def __init__(self) -> None:
        self._seconds_each: float | None = None

    def after(self, count: int, seconds: float) -> float:
        """With one step more, of so many in so many seconds."""
        new = seconds / count
        old = new if self._seconds_each is None else self._seconds_each
        self._seconds_each = old + self.SMOOTHING * (new - old)
        return 1 / self._seconds_each if self._seconds_each > 0 else 0.0


def counted(number: float) -> str:
    """Three digits and a unit: 874, 41.2k, 1.30M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 3 - len(str(int(value))))}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """In the unit that reads well: 40 s, 12 min, 5 h, 3 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took of a GPU so far, on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


class _Lines(logging.Handler):
    """Log records as the console's lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"{record.levelname.lower()}: {record.getMessage()}")
