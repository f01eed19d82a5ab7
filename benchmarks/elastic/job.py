"""The job of the elastic benchmarks, `python -m benchmarks.elastic.job SETTINGS.json`: elastic, or stock by torchrun.

The same model, optimizer and data either way: two linear layers of `width`, AdamW, FSDP2 or ZeRO. Each worker notes a
finished step with the time of day. The stock job saves with torch.distributed.checkpoint every ten steps and resumes
from the newest, as torchrun's users do; the elastic one has its mirror.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

FEATURES, CLASSES, UNIT, BATCH = 12, 5, 2, 12
SAVE_EVERY = 10
BLOCK = 4
"""Steps in a row with, then without a mirror, where its cost is measured."""


class Rows:
    """Random rows whose content depends on their number alone."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        return torch.randn(FEATURES, generator=draw), torch.randint(CLASSES, (), generator=draw)


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def sharded(width: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Net(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def note(folder: Path, **row: Any) -> None:
    with (folder / f"steps-{os.getpid()}.jsonl").open("a") as out:
        out.write(json.dumps({"at": time.time(), "pid": os.getpid(), **row}) + "\n")


def elastic(settings: dict[str, Any]) -> None:
    """The job on `lso.elastic.run`."""
    import elastic_lsopt as lso
    from elastic_lsopt.backends.detect import backend_for
    from elastic_lsopt.schedules.batch_scaling import Hyperparameters

    folder, unit, batch = Path(settings["folder"]), settings.get("unit", UNIT), settings.get("batch", BATCH)
    total = settings["steps"] * batch
    if settings.get("blocks"):
        mirror_in_blocks()

    def build(world: lso.elastic.World) -> lso.elastic.Job:
        if settings["backend"] == "fsdp2":
            model = sharded(settings["width"])
            engine = lso.Engine(
                backend_for(model, adamw(model.parameters())), lso.Plain(), loss_fn=loss, total_samples=total
            )
        else:
            torch.manual_seed(0)
            zero = {"zero_optimization": {"stage": int(settings["backend"][-1])}, "gradient_clipping": 0.0}
            engine = lso.initialize(
                model=Net(settings["width"]), config=zero, method=lso.Plain(), base=adamw, loss_fn=loss,
                total_samples=total,
            )  # fmt: skip

        def on_step(job: lso.elastic.Job, row: dict[str, Any]) -> None:
            time.sleep(settings["slow_s"])
            note(folder, generation=world.generation, world=world.size, step=row["step"], seconds=row["seconds"])

        return lso.elastic.Job(world=world, engine=engine, dataset=Rows(), collate=collate, seed=1, on_step=on_step)

    lso.elastic.run(
        build, settings["elastic"], output_dir=folder, workers=1, microbatch_size=unit,
        reference=Hyperparameters(
            global_batch_size=batch, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01
        ),
    )  # fmt: skip


def mirror_in_blocks() -> None:
    """Every other block of steps goes without host version and mirror."""
    from elastic_lsopt.elastic.worker.runtime import Runtime

    keep = Runtime._keep

    def sometimes(self: Runtime, *, wait: bool) -> None:
        assert self._run is not None
        if wait or self._run.engine.clock.steps // BLOCK % 2 == 0:
            keep(self, wait=wait)

    Runtime._keep = sometimes  # type: ignore[method-assign]


def stock(settings: dict[str, Any]) -> None:
    """The job as one writes it for torchrun: start from the newest checkpoint, save every ten steps."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dist.init_process_group("gloo")
    rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(settings["folder"])
    model = sharded(settings["width"])
    optimizer = adamw(model.parameters())
    saved = sorted(int(p.name) for p in (folder / "dcp").glob("[0-9]*") if (p / ".metadata").exists())
    step, data = 0, Rows()
    if saved:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder / "dcp" / str(saved[-1]))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        step = saved[-1]
    while step < settings["steps"]:
        first = step * BATCH + rank * (BATCH // world)
        batch = collate([data[i % len(data)] for i in range(first, first + BATCH // world)])
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=folder / "dcp" / str(step))
        time.sleep(settings["slow_s"])
        note(folder, generation=int(os.environ["TORCHELASTIC_RESTART_COUNT"]), world=world, step=step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    (stock if given["stock"] else elastic)(given)
