"""Cases in which a save goes wrong: ranks that die while writing, a full disk, state that cannot be saved."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.checkpoint import Checkpointer, TrainingState
from tests.cases import engines


def _engine(kind: str) -> lso.Engine:
    return engines.build(kind, engines.net(), lso.SAM(rho=0.3))


def _train(engine: lso.Engine, steps: int = 1) -> None:
    for units in engines.batches(steps, 2):
        engine.train_batch(engines.mine(units))


def _save(checkpoints: Checkpointer, engine: TrainingState, step: int, **more: Any) -> str | None:
    checkpoints.save(engine, step, **more)
    report = checkpoints.wait()
    assert report is not None and report.step == step
    return report.error


def killed(path: str, rank: int, where: str) -> str | None:
    """Save step 1, then step 2, in which `rank` is killed at `where`; what the others are told."""
    model = nn.Module()
    model.first = nn.Linear(1500, 1500)
    model.forward = model.first.forward
    engine = engines.build("fsdp2", model, lso.Plain())
    checkpoints = Checkpointer(path, save_total_limit=1)
    assert _save(checkpoints, engine, 1) is None
    if dist.get_rank() == rank:
        if where == "in its file":
            _die_when_larger(1 << 20)
        else:
            event, name = {
                "at the manifest": ("open", "manifest.json"),
                "at the rename": ("os.rename", ".tmp-checkpoint-2.0"),
                "while the old one goes": ("shutil.rmtree", ".tmp-checkpoint-1.0"),
            }[where]
            _die_at(event, name)
    return _save(checkpoints, engine, 2)


def _die_at(event: str, name: str) -> None:
    def hook(seen: str, arguments: Any) -> None:
        if seen == event and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _die_when_larger(size: int) -> None:
    """In the write that makes a file of this process larger than that: the kernel ends it in the middle."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def full_disk(path: str) -> dict[str, Any]:
    """Three saves with training between them; while the second is written there is no room left."""
    engine = _engine("fsdp2")
    checkpoints = Checkpointer(path)
    _train(engine)
    first = _save(checkpoints, engine, 1)
    ballast = Path(path, "ballast")
    if dist.get_rank() == 0:
        with ballast.open("wb", buffering=0) as out:
            try:
                while True:
                    out.write(bytes(1 << 16))
            except OSError:
                pass
    dist.barrier()
    _train(engine)
    second = _save(checkpoints, engine, 2)
    _train(engine)
    names = sorted(p.name for p in Path(path).iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        ballast.unlink()
    third = _save(checkpoints, engine, 3)
    checkpoints.close()
    return {"errors": [first, second, third], "names": names, "steps": engine.clock.steps}


def file_limit_on_rank_1(path: str) -> list[str | None]:
    """Only rank 1 cannot write (a limit of its process on the size of a file); then it can again."""
    engine = _engine("fsdp2")
    checkpoints = Checkpointer(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        error = _save(checkpoints, engine, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = [error, _save(checkpoints, engine, 2)]
    checkpoints.close()
    return out


def refused(path: str, what: str) -> str:
    """What each rank is told when rank 1 alone has something that cannot be saved; the group works on after it."""
    engine = _engine("ddp")
    checkpoints = Checkpointer(path)
    _train(engine)
    state = engine.base.state[next(iter(engine.base.state))]  # type: ignore[union-attr]
    extra = None
    if dist.get_rank() == 1:
        match what:
            case "state":
                state["rows"] = torch.ones(5)
            case "stale":
                engine.space.copies.mark_stale("a test")
            case _:
                extra = {"loader": object()}
    try:
        checkpoints.save(engine, 1, extra=extra)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    state.pop("rows", None)
    engine.space.resync()
    assert _save(checkpoints, engine, 1) is None
    checkpoints.close()
    return said


def unpickled(path: str) -> list[str]:
    """The classes and functions that a save and a resume of one process have looked up for a pickle."""
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: Any) -> None:
        if watching and event == "pickle.find_class":
            seen.append(f"{arguments[0]}.{arguments[1]}")

    engine = _engine("plain")
    checkpoints = Checkpointer(path)
    _train(engine)
    sys.addaudithook(hook)
    assert _save(checkpoints, engine, 1) is None
    # what torch's own reader would open, and run
    (Path(path) / "checkpoint-1" / ".metadata").write_bytes(b"cos\n_exit\n(I9\ntR.")
    assert checkpoints.resume(engine) is not None
    watching = False
    checkpoints.close()
    return seen
