"""Host memory of the mirror, counted: every buffer that its versions live in, on a network slower than the steps."""

from __future__ import annotations

import threading
import weakref
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.trail import Trail
from elastic_lsopt.elastic.memory.versions import HostVersions
from elastic_lsopt.training.estimate.placement import Placement
from elastic_lsopt.training.estimate.state import mirror_per_rank
from tests.cases import engines


class Counted:
    """Bytes of the living uint8 buffers that were made while it is in force, and their largest sum."""

    def __init__(self) -> None:
        self._living: list[weakref.ref[torch.Tensor]] = []
        self._make, self.most = torch.empty, 0

    def empty(self, *args: Any, **more: Any) -> torch.Tensor:
        made = self._make(*args, **more)
        if more.get("dtype") == torch.uint8:
            self._living.append(weakref.ref(made))
            self.most = max(self.most, self.bytes)
        return made

    @property
    def bytes(self) -> int:
        return sum(t.numel() for ref in self._living if (t := ref()) is not None)


def slow_network(budget_versions: float, steps: int = 14, rows: int = 96) -> dict[str, Any]:
    """`steps` steps of AdamW whose versions take far longer to mirror than to make; what was held at most.

    `budget_versions` is the budget over the bytes of one version of this rank and of its mirrored peer.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(rows, rows, bias=False) for _ in range(4)))
    parameters = sum(p.numel() for p in model.parameters())
    engine = engines.build("fsdp2", model, engines.lso.SAM(rho=0.0), base="adamw", loss_fn=lambda m, b: m(b).sum())
    at = Placement(backend="fsdp2", world=world)
    budget = budget_versions * sum(mirror_per_rank(parameters, at).values()) / 3
    versions, counted = HostVersions(), Counted()
    mirror = Mirror(dist.new_group(backend="gloo"), rank, world, [str(r) for r in range(world)], 1)
    trail = Trail(versions, mirror, generation=1, budget_bytes=budget, timeout_s=30.0)
    transfer, wait, held = mirror._transfer, mirror.wait, []
    may_pass = threading.Semaphore(0)

    def slow(*args: Any) -> None:
        may_pass.acquire()
        transfer(*args)

    def wait_for(step: int, *, timeout_s: float) -> None:
        """The network moves only when somebody waits for it."""
        for _ in range(step - max(0, mirror.acknowledged)):
            may_pass.release()
        wait(step, timeout_s=timeout_s)

    slow_mirror = patch.multiple(mirror, _transfer=slow, wait=wait_for)
    with slow_mirror, patch.object(torch, "empty", counted.empty):
        for step in range(1, steps + 1):
            engine.train_batch([torch.randn(2, rows)])
            signals = torch.tensor(trail.lags())
            dist.all_reduce(signals)
            if step > 1:
                trail.heard(signals.tolist())
            trail.keep(engine, step, {}, wait=False)
            held.append(len(versions.held))
        mirror.wait(steps, timeout_s=30)
        mirror.close()
    one = versions.newest.index.bytes + mirror.ward_bytes
    return {
        "most": counted.most, "one": one, "held": max(held),
        "said": sum(mirror_per_rank(parameters, at, budget_bytes=budget).values()),
    }  # fmt: skip
