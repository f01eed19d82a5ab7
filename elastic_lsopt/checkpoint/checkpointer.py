"""Save, in the background, and resume: the two sentences that a training loop says.

    checkpoints = Checkpointer("runs/a/checkpoints", save_total_limit=2)        # collective, on every rank
    found = checkpoints.resume(engine, "auto")                                  # None: start from the beginning
    …
    checkpoints.save(engine, step, extra={"loader": loader.state_dict()})
    …
    checkpoints.close()                                                         # waits for the last one

[Note: a save that fails] A full disk or a lost peer must not end training. A save has three stages: rank 0 makes the
staged folder, every rank writes its file, rank 0 commits. The ranks agree after each, so all of them report the same
failure, the staged folder goes, and the last good checkpoint stays.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from elastic_lsopt.backends.agreement import gather_json, one_line, together
from elastic_lsopt.backends.groups import present
from elastic_lsopt.checkpoint import folder as folders
from elastic_lsopt.checkpoint.contents import (
    Held,
    Keys,
    Snapshot,
    TrainingState,
    chunks_of,
    owned_vectors,
    take_snapshot,
)
from elastic_lsopt.checkpoint.planner import Chunk, share_out
from elastic_lsopt.checkpoint.restore import refuse_other_model, restore
from elastic_lsopt.checkpoint.storage import Json, SafetensorsReader, contents_of, write_share
from elastic_lsopt.errors import StaleGeneration, UserError
from elastic_lsopt.oracle.clock import SampleClock

log = logging.getLogger("elastic_lsopt")
TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the slowest one's file."""
T = TypeVar("T")
MayCommit = Callable[[int], bool]


class SaveFailed(RuntimeError):
    """A stage of a save failed on some rank; the message begins with the first one."""


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
        self._job = present().job
        self.rank, self.world = self._job.rank, self._job.size
        # A group of its own: the background write's collectives must never meet those of the training step.
        self._group = self._job.again("checkpoint", TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[SaveReport] | None = None
        self._report: SaveReport | None = None
        self._mine: tuple[tuple[object, list[tuple[str, str]]], set[Chunk]] | None = None
        self._crowded = False
        """Whether older checkpoints are to be pruned for the newest one."""
        self._committed: Path | None = None
        """The newest checkpoint of this job, on rank 0."""
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
        self, state: TrainingState, step: int, *, extra: dict[str, Any] | None = None, asynchronous: bool = True,
        prune: bool = True,
    ) -> None:  # fmt: skip
        """Write `checkpoint-<step>`; returns as soon as the state is copied to host memory, if `asynchronous`.

        `extra` is the caller's own JSON (cursor, scheduler …), rank 0's. Waits for the save before. See [Note: a save
        that fails]; `wait` tells. Without `prune`, older checkpoints beyond the limit stay until `prune` is called: for
        a job that has yet to see whether this state is good. Host memory: this rank's share of weights and optimizer
        state while it is written.
        Raises StaleWeights inside a perturbed pass, Unsupported for optimizer state that cannot be resharded, and
        UserError for an `extra` that is not JSON, on all ranks.
        """
        self.wait()
        start = time.monotonic()
        mine = self._share(state)
        snapshot = self._together(lambda: take_snapshot(state, step, extra or {}, mine, copy=asynchronous))
        path = folders.checkpoint_path(self.folder, step)
        self._pending = self._thread.submit(self._write, snapshot, path, step, start, prune)
        self._crowded = not prune
        if not asynchronous:
            self.wait()

    def prune(self) -> None:
        """Delete the checkpoints beyond the limit, in the background and on rank 0: the newest has proved good.

        Nothing where its save has failed, or where this group may no longer commit.
        """
        if self._crowded:
            self._crowded = False
            self._thread.submit(self._prune)

    def _prune(self) -> None:
        path = self._committed
        if path is not None and (self._may_commit is None or self._may_commit(folders.step_of(path))):
            folders.retain(self.folder, path, self.save_total_limit)

    def wait(self) -> SaveReport | None:
        """Wait for the save that is being written; how the newest save ended, None before the first."""
        if self._pending is not None:
            self._report, self._pending = self._pending.result(), None
        return self._report

    def close(self) -> None:
        """Wait for the last save and end the background thread and its group."""
        self.wait()
        self._thread.shutdown()
        self._job.end(self._group)
        self._group = None

    def abandon(self) -> None:
        """Let go of a save that may be under way, whose peers may be dead. No communication; not for use after."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _share(self, state: TrainingState) -> set[Chunk]:
        """The pieces that this rank writes: replicas of a piece share the work."""
        layout = state.backend.layout, [(name, key) for name, key, _ in owned_vectors(state)]
        if self._mine is None or self._mine[0][0] is not layout[0] or self._mine[0][1] != layout[1]:
            suffix = Keys.of(state.backend).suffix  # replicas share no work: each has weights of its own
            own = [(f"{name}{suffix}", at, length) for name, at, length in chunks_of(state)]
            held = [[(name, at, length) for name, at, length in theirs] for theirs in self._everyones(own)]
            mine = share_out(held)[self.rank]
            self._mine = layout, {(name.removesuffix(suffix), at, length) for name, at, length in mine}
        return self._mine[1]

    def _write(self, snapshot: Snapshot, path: Path, step: int, start: float, prune: bool) -> SaveReport:
        staged, own, error = folders.staging(path, self._writer), Json(), None
        try:
            self._stage(lambda: self._open(staged))
            everyones = self._stage(lambda: write_share(snapshot, staged / f"rank-{self.rank}.safetensors"))
            own = everyones[self.rank]
            self._stage(lambda: self._commit(path, step, everyones))
        except Exception as failure:
            error = one_line(failure)
        if self.rank == 0 and error is None:
            self._committed = path
            if prune:
                folders.retain(self.folder, path, self.save_total_limit)
        elif self.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
            left = next((p.name for p in folders.listing(self.folder)), None)
            stays = f"the last good checkpoint is {left}" if left else "there is no checkpoint yet"
            log.warning("the save of step %d failed (%s); training goes on, %s.", step, error, stays)
        return SaveReport(path, step, time.monotonic() - start, own["file"]["bytes"] if own else 0, error)

    def _stage(self, act: Callable[[], Any]) -> list[Any]:
        """What `act()` returned on each rank (JSON). Raises the first failure by rank, the same one on all ranks."""
        try:
            own = [act(), None]
        except Exception as failure:
            own = [None, one_line(failure)]
        everyones = self._everyones(own)
        for rank, (_, failure) in enumerate(everyones):
            if failure is not None:
                raise SaveFailed(f"rank {rank}: {failure}")
        return [told for told, _ in everyones]

    def _open(self, staged: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)

    def _commit(self, path: Path, step: int, written: list[Json]) -> None:
        """Contents and manifest, then the name; the fence is asked at the last moment."""
        if self.rank != 0:
            return
        contents, records = contents_of(written)
        if self._may_commit is not None and not self._may_commit(step):
            raise StaleGeneration("the job has gone on without this group, whose checkpoint does not count")
        records.append(folders.write_json(folders.staging(path, self._writer) / folders.CONTENTS, contents))
        folders.commit(path, records, self._writer)

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
        self._together(lambda: refuse_other_model(state, saved.metadata, hyperparameters=hyperparameters))

        def read(wanted: dict[str, Held]) -> None:
            try:
                saved.read(wanted)
            except Exception as failure:
                raise UserError(f"{path} could not be loaded: {one_line(failure)}.") from failure

        def fill(wanted: dict[str, Held]) -> None:
            self._together(lambda: read(wanted))

        restore(state, saved, fill, hyperparameters=hyperparameters)
        metadata = saved.metadata
        return LoadReport(path, metadata["step"], state.clock, metadata["extra"], metadata["world"] == self.world)

    def _newest(self) -> Path | None:
        candidates, reason = self._first_listing(self.folder), None
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
            inside = self._first_listing(path)
            fix = f"give {inside[0]}" if inside else "give the path of an intact checkpoint-<step>, auto or none"
            raise UserError(f"resume_from_checkpoint={path} is no intact checkpoint: {reason}; {fix}.")
        return path

    def _first_listing(self, folder: Path) -> list[Path]:
        """As rank 0 sees it, so that all ranks try the same checkpoints."""
        return [folder / name for name in self._everyones([path.name for path in folders.listing(folder)])[0]]

    def _damage(self, path: Path) -> str | None:
        found = self._everyones(folders.damage(path, self.rank, self.world))
        return next((reason for reason in found if reason is not None), None)

    # -- agreeing ----------------------------------------------------------------------------------------------

    def _everyones(self, own: Any) -> list[Any]:
        """What each rank gave, as JSON."""
        return gather_json(self._group, own)

    def _together(self, act: Callable[[], T]) -> T:
        return together(self._group, act)
