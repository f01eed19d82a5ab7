"""Save, in the background, and resume: the two sentences that a training loop says.

    checkpoints = Checkpointer("runs/a/checkpoints", save_total_limit=2)        # collective, on every rank
    found = checkpoints.resume(engine, "auto")                                  # None: start from the beginning
    …
    checkpoints.save(engine, step, extra={"loader": loader.state_dict()})
    …
    checkpoints.close()                                                         # waits for the last one

[Note: a save that fails] A full disk or a lost peer must not end training. The ranks agree in the collective that ends
the write, so all of them report the same failure, the staged folder goes, and the last good checkpoint stays.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from elastic_lsopt.checkpoint import folder as folders
from elastic_lsopt.checkpoint.contents import Held, Snapshot, TrainingState, chunk_of, take_snapshot
from elastic_lsopt.checkpoint.planner import ChunkLoadPlanner, ChunkSavePlanner, share_out
from elastic_lsopt.checkpoint.restore import refuse_other_model, restore
from elastic_lsopt.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from elastic_lsopt.errors import PeerFailed, StaleGeneration, UserError
from elastic_lsopt.oracle.clock import SampleClock

log = logging.getLogger("elastic_lsopt")
TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the slowest one's file."""
T = TypeVar("T")
MayCommit = Callable[[int], bool]
# Said at each save and load of a job of one process, where it is no news.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class SaveReport:
    """How a save ended; the same on all ranks but for the bytes."""

    path: Path
    step: int
    seconds: float
    """From the call of `save` to the commit."""
    bytes: int
    """Tensor file of this rank."""
    error: str | None = None
    """Why there is no new checkpoint, in one line."""


@dataclass(frozen=True)
class LoadReport:
    """What was resumed from."""

    path: Path
    step: int
    clock: SampleClock
    extra: dict[str, Any]
    """The caller's own JSON."""
    same_world: bool
    """Saved by as many ranks: torch's random generators were restored too."""


class Checkpointer:
    """The checkpoints of one folder, which all ranks share. All methods are collective.

    `save_total_limit` is how many to keep (None: all; >= 1). Leftovers of a job that died while saving are deleted.
    `may_commit(step)` is asked on rank 0 before a checkpoint gets its name: False where this group is no longer the
    job's (the elastic runtime's fence); `writer` is its generation there. Raises UserError for a limit below 1 or a
    folder that cannot be made.
    """

    def __init__(
        self, folder: str | Path, *, save_total_limit: int | None = None, may_commit: MayCommit | None = None,
        writer: int = 0,
    ) -> None:  # fmt: skip
        if save_total_limit is not None and save_total_limit < 1:
            raise UserError(f"save_total_limit={save_total_limit} must be >= 1 (or null: keep all checkpoints).")
        self.folder, self.save_total_limit, self._may_commit = Path(folder), save_total_limit, may_commit
        self._writer = writer
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # A group of its own: the background write's collectives must never meet those of the training step.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[SaveReport] | None = None
        self._report: SaveReport | None = None
        self._mine: tuple[object, set[tuple[str, int, int]]] | None = None
        self._together(self._prepare)

    def _prepare(self) -> None:
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                folders.clean(self.folder)
            except OSError as error:
                raise UserError(f"the checkpoint folder {self.folder} cannot be used: {error.strerror}.") from error

    # -- saving ------------------------------------------------------------------------------------------------

    def save(
        self, state: TrainingState, step: int, *, extra: dict[str, Any] | None = None, asynchronous: bool = True
    ) -> None:
        """Write `checkpoint-<step>`; returns as soon as the state is copied to host memory, if `asynchronous`.

        `extra` is the caller's own JSON (cursor, scheduler …), rank 0's. Waits for the save before. See [Note: a save
        that fails]; `wait` tells. Host memory: this rank's share of weights and optimizer state while it is written.
        Raises StaleWeights inside a displaced pass, Unsupported for optimizer state that cannot be resharded, and
        UserError for an `extra` that is not JSON, on all ranks.
        """
        self.wait()
        start = time.monotonic()
        mine = self._share(state)
        snapshot = self._together(lambda: take_snapshot(state, step, extra or {}, mine, copy=asynchronous))
        path = folders.checkpoint_path(self.folder, step)
        self._pending = self._thread.submit(self._write, snapshot, path, step, start)
        if not asynchronous:
            self.wait()

    def wait(self) -> SaveReport | None:
        """Wait for the save that is being written; how the newest save ended, None before the first."""
        if self._pending is not None:
            self._report, self._pending = self._pending.result(), None
        return self._report

    def close(self) -> None:
        """Wait for the last save and end the background thread and its group."""
        self.wait()
        self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def abandon(self) -> None:
        """Let go of a save that may be under way, whose peers may be dead. No communication; not for use after."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fence(self, step: int) -> Callable[[], None]:
        def refuse_outdated() -> None:
            if self._may_commit is not None and not self._may_commit(step):
                raise StaleGeneration("the job has gone on without this group, whose checkpoint does not count")

        return refuse_outdated

    def _share(self, state: TrainingState) -> set[tuple[str, int, int]]:
        """The pieces that this rank writes: replicas of a piece share the work."""
        layout = state.backend.layout
        if self._mine is None or self._mine[0] is not layout:
            own = [chunk_of(state.backend, piece) for piece in layout.pieces]
            self._mine = layout, share_out(self._everyones(own))[self.rank]
        return self._mine[1]

    def _write(self, snapshot: Snapshot, path: Path, step: int, start: float) -> SaveReport:
        writer, error = SafetensorsWriter(path, self._fence(step), self._writer), None
        try:
            dcp.save(
                snapshot.tensors, storage_writer=writer, planner=ChunkSavePlanner(snapshot.facts),
                process_group=self._group, no_dist=self.world == 1,
            )  # fmt: skip
        except (Exception, dcp.CheckpointException) as failure:  # the latter is no Exception
            error = one_line(failure)
        if self.rank == 0 and error is None:
            folders.retain(self.folder, path, self.save_total_limit)
        elif self.rank == 0:
            shutil.rmtree(folders.staging(path, self._writer), ignore_errors=True)
            left = next((p.name for p in folders.listing(self.folder)), None)
            stays = f"the last good checkpoint is {left}" if left else "there is no checkpoint yet"
            log.warning("the save of step %d failed (%s); training goes on, %s.", step, error, stays)
        return SaveReport(path, step, time.monotonic() - start, writer.bytes, error)

    # -- resuming ----------------------------------------------------------------------------------------------

    def resume(
        self, state: TrainingState, how: str | Path = "auto", *, hyperparameters: bool = True
    ) -> LoadReport | None:
        """Put the checkpoint into `state`, at any world size and on any backend; None where nothing was to resume.

        `how` is "auto" (the newest intact one of the folder; a damaged one is skipped with a warning), "none", or the
        path of one. `hyperparameters=False` keeps this optimizer's learning rate, betas and so on. Time: each file is
        read twice, once for its checksum, by all ranks together. Raises UserError for a path that is not an intact
        checkpoint, for a folder with none but damaged ones, and for a checkpoint of another model.
        """
        self.wait()
        if str(how) == "none":
            return None
        path = self._newest() if str(how) == "auto" else self._given(Path(how))
        if path is None:
            return None
        saved = self._together(lambda: SafetensorsReader(path))
        self._together(lambda: refuse_other_model(state, saved.facts, hyperparameters=hyperparameters))

        def fill(wanted: dict[str, Held]) -> None:
            try:
                dcp.load(
                    wanted, storage_reader=saved, planner=ChunkLoadPlanner(), process_group=self._group,
                    no_dist=self.world == 1,
                )  # fmt: skip
            except dcp.CheckpointException as failure:
                raise UserError(f"{path} could not be loaded: {one_line(failure)}.") from None

        restore(state, saved, fill, hyperparameters=hyperparameters)
        facts = saved.facts
        return LoadReport(path, facts["step"], state.clock, facts["extra"], facts["world"] == self.world)

    def _newest(self) -> Path | None:
        candidates: list[Path] = self._everyones(folders.listing(self.folder))[0]
        for path in candidates:
            if (reason := self._damage(path)) is None:
                return path
            if self.rank == 0:
                folders.warn_skipped(path, reason)
        if candidates:
            raise UserError(
                f"none of the {len(candidates)} checkpoints in {self.folder} is intact ({reason}); "
                "set resume_from_checkpoint: none to start anew."
            )
        return None

    def _given(self, path: Path) -> Path:
        if (reason := self._damage(path)) is not None:
            inside = self._everyones(folders.listing(path))[0]
            fix = f"give {inside[0]}" if inside else "give the path of an intact checkpoint-<step>, auto or none"
            raise UserError(f"resume_from_checkpoint={path} is no intact checkpoint: {reason}; {fix}.")
        return path

    def _damage(self, path: Path) -> str | None:
        found = self._everyones(folders.damage(path, self.rank, self.world))
        return next((reason for reason in found if reason is not None), None)

    # -- agreeing ----------------------------------------------------------------------------------------------

    def _everyones(self, own: T) -> list[T]:
        """What each rank gave."""
        if self._group is None:
            return [own]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, own, group=self._group)
        return out

    def _together(self, act: Callable[[], T]) -> T:
        """`act()` on all ranks; where it raises on one, all raise (a user's error as a user's error)."""
        result, error = None, None
        try:
            result = act()
        except Exception as raised:
            error = raised
        said = self._everyones(None if error is None else (isinstance(error, UserError), one_line(error)))
        if error is not None:
            raise error
        for rank, other in enumerate(said):
            if other is not None:
                raise (UserError if other[0] else PeerFailed)(f"rank {rank}: {other[1]}")
        return result  # type: ignore[return-value]


def one_line(error: BaseException) -> str:
    """An error without its traceback; of a collective failure the first rank's, by number."""
    if isinstance(error, dcp.CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {one_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
