"""What only a device has: groups of NCCL that are broken and formed anew, state that comes back from host memory."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.fabric import fabric_for
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.elastic.memory.reshard import choose, inventory, reshard
from elastic_lsopt.elastic.memory.versions import HostVersions
from tests.cases import engines
from tests.cases.elastic.reforming import reforming

STEPS = 6


def allocated() -> int:
    """Bytes of the device in use; of a CPU 0."""
    if engines.DEVICE.type == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def broken_and_formed(times: int) -> dict[str, Any]:
    """A group is formed, used, cut from another thread, and dropped, `times` times in one process."""
    left, seconds, alive = [], [], 0
    fabric = fabric_for(engines.DEVICE.type)
    with reforming() as form:
        for _ in range(times):
            begin = time.monotonic()
            form([0])
            engine = engines.build("fsdp2", engines.net(), lso.SAM(rho=0.3))
            engine.train_batch(engines.mine(engines.batches(1, 2)[0]))
            cut = threading.Thread(target=fabric.cut, args=((), 0))
            cut.start()
            cut.join(timeout=20)
            alive += cut.is_alive()
            tear_down(engine)
            seconds.append(time.monotonic() - begin)
            left.append(allocated())
    return {"left": [left[1], left[-1]], "longest_s": max(seconds), "hung": alive}


def back_from_the_host(kind: str) -> dict[str, Any]:
    """Three steps, a version in host memory, the engine dropped; a new one goes on from it, to the bit."""
    versions, out = HostVersions(), {}

    def train(engine: lso.Engine, first: int, last: int) -> list[float]:
        return [engine.train_batch(engines.mine(s)) for s in engines.batches(STEPS, 3)[first:last]]

    with reforming() as form:
        form([0])
        engine = engines.build(kind, engines.net(), lso.SAM(rho=0.3), base="adamw")
        train(engine, 0, 3)
        versions.take(engine, generation=1, step=3, extra={})
        versions.commit(1, 3)
        wanted = train(engine, 3, STEPS), [t.cpu() for t in engine.space.weights.tensors]
        tear_down(engine)
        form([0])
        group = dist.distributed_c10d._get_default_group()
        engine = engines.build(kind, engines.net(seed=7), lso.SAM(rho=0.3), base="adamw")
        found = gather_json(group, inventory(versions))
        chosen = choose(found)
        assert chosen is not None
        reshard(engine, versions, chosen, found, group)
        losses = train(engine, 3, STEPS)
        out["losses"] = losses == wanted[0]
        out["weights"] = all(map(torch.equal, (t.cpu() for t in engine.space.weights.tensors), wanted[1]))
        tear_down(engine)
    return out
