"""A job that is killed again and again: a user's own loop on `lso.elastic.run`, tiny, deterministic, fp32.

python -m tests.chaos.job SETTINGS.json                 (the agent; started by it again, a worker)

Each worker notes every step that it has finished, with the loss and the samples that it has run, in
`steps-<pid>.jsonl` of the run folder, so that the driver can compare with the undisturbed run. A file
`at-<point>` in the run folder with a signal's number makes the first worker that gets to that point send itself the
signal. While the file `hold` is there, no new worker gets ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.elastic.agent.roles import run
from elastic_lsopt.elastic.worker.generation import life, live_generation
from elastic_lsopt.elastic.worker.job import Job
from elastic_lsopt.schedules.batch_scaling import Hyperparameters
from elastic_lsopt.world import World

SAMPLES, FEATURES, CLASSES = 96, 12, 5
UNIT, BATCH, LR = 2, 8, 0.005
"""The rate is low, so that rounding, which differs with the world size, does not grow in hundreds of steps."""


class Rows:
    """Random rows whose content depends on their number alone."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        draw = torch.Generator().manual_seed(index)
        return torch.randn(FEATURES, generator=draw), torch.randint(CLASSES, (), generator=draw), index


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    x, y, index = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y), "index": torch.tensor(index)}


class Net(nn.Module):
    """Two layers with dropout, whose masks must not depend on the world size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(FEATURES, width), nn.Linear(width, CLASSES), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def engine_of(backend: str, width: int, total_samples: int) -> lso.Engine:
    """The same model on any backend, under the present process group."""
    torch.manual_seed(0)
    model = Net(width)
    method = lso.SAM(rho=0.05)

    def base(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, momentum=0.9)

    if backend.startswith("zero"):
        config = {"zero_optimization": {"stage": int(backend[-1])}, "gradient_clipping": 1.0}
        return lso.initialize(
            model=model, config=config, method=method, base=base, loss_fn=loss, total_samples=total_samples
        )
    if backend == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif backend == "ddp" and dist.get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    return lso.Engine(
        backend_for(model, base(model.parameters()), max_grad_norm=1.0),
        method,
        loss_fn=loss,
        total_samples=total_samples,
    )


def heard(world: World, row: dict[str, Any]) -> int | None:
    """In a job of two replicas: the step that the other one has said last where replicas meet."""
    if world.meetings is None:
        return None
    with suppress(RuntimeError):  # the host is dead, and nobody knows yet
        world.meetings.set(f"at/{world.replica}", str(row["step"]))
        if world.meetings.check([other := f"at/{1 - world.replica}"]):
            return int(world.meetings.get(other))
    return None


def weights(backend: str, engine: lso.Engine) -> int | None:
    """A checksum of this rank's weights where each rank holds all of them, so that all ranks must say the same."""
    if backend in ("fsdp2", "zero3"):
        return None
    return zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in engine.module.parameters()))


def main(path: Path) -> None:
    settings = json.loads(path.read_text())
    folder, total = Path(settings["folder"]), settings["steps"] * BATCH
    taken: list[int] = []

    def build(world: World) -> Job:
        while world.rehearsal and (folder / "hold").exists():
            time.sleep(0.02)
        engine = engine_of(settings["backend"], settings["width"], total)
        original = engine.train_batch

        def train_batch(units: Any) -> float:
            taken[:] = [int(i) for unit in units if not unit.idle for i in unit.batch["index"]]
            return original(units)

        engine.train_batch = train_batch  # type: ignore[method-assign]
        arm(folder, engine, world)

        def on_step(job: Job, row: dict[str, Any]) -> None:
            if not (folder / "hurry").exists():
                time.sleep(settings["slow_s"])
            line = {
                "rank": world.rank, "ids": taken, "weights": weights(settings["backend"], job.engine),
                "replica": world.replica, "sizes": job.world.sizes, "at": time.time(),
                "heard": None if (folder / "quiet").exists() else heard(job.world, row), **row,
            }  # fmt: skip
            with (folder / f"steps-{os.getpid()}.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")
            if (cut := folder / f"cut-{world.replica}").exists() and world.is_first:
                cut.unlink()
                job.engine.backend.transport.sever()  # its connections break, and nobody has died

        own = folder / f"replica-{world.replica}" if world.replica else folder
        return Job(
            world=world, engine=engine, dataset=Rows(), collate=collate, seed=1, on_step=on_step,
            checkpoints=own / "checkpoints", save_steps=settings.get("save_steps"),
        )  # fmt: skip

    run(
        build, settings["elastic"], reference=Hyperparameters(global_batch_size=BATCH, learning_rate=LR, momentum=0.9),
        microbatch_size=UNIT, output_dir=folder, workers=settings["workers"], replicas=settings.get("replicas", 1),
    )  # fmt: skip


# -- named points -------------------------------------------------------------------------------------------------


def at(folder: Path, point: str) -> None:
    """Take the order that the driver left for this point, if any: stop with its signal."""
    order = folder / f"at-{point}"
    mine = order.with_name(f"took-{point}-{os.getpid()}")
    try:
        order.rename(mine)  # one worker takes it
    except FileNotFoundError:
        return
    os.kill(os.getpid(), int(mine.read_text()))


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Call `act` before each call of `owner.name`."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def arm(folder: Path, engine: lso.Engine, world: World) -> None:
    """The points inside one generation's engine."""
    if world.generation == 0:
        return  # warming up

    def forward(*_: Any) -> None:
        at(folder, "perturbed" if engine.space.copies.perturbations else "forward")

    engine.module.register_forward_pre_hook(forward)
    engine.module.last.register_full_backward_hook(lambda *_: at(folder, "backward"))
    before(engine.backend, "sum_replica_", lambda: at(folder, "all-reduce"))


def arm_runtime(folder: Path) -> None:
    """The points of the runtime itself."""
    before(live_generation.Mirror, "push", lambda: at(folder, "mirroring"))
    before(live_generation, "reshard", lambda: at(folder, "resharding"))
    before(life.HostVersions, "commit", lambda: at(folder, "committing"))
    before(live_generation, "choose", lambda: at(folder, "recovery"))
    from elastic_lsopt.checkpoint import folder as folders

    before(folders, "commit", lambda: at(folder, "saving"))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    arm_runtime(Path(json.loads(target.read_text())["folder"]))
    main(target)
