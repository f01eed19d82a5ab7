"""Three nodes train together; one is killed, a new one joins; every loss is that of a run that nobody disturbed.

    python examples/elastic_demo.py          # about a minute on two cores; all nodes are this machine

`build` and `main` are all that a training of one's own needs. What follows them starts the nodes, kills one, adds one
and prints each change of members. A second terminal may watch: `elastic-lsopt status FOLDER`, with the folder printed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import elastic_lsopt as lso

BATCH, UNIT, STEPS, PACE_S = 32, 8, 80, 0.15
KILL_AT, NODES = 15, 3


def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y)


def collate(rows):
    x, y = zip(*rows, strict=True)
    return torch.stack(x), torch.stack(y)


def taught_rows():
    """Points with the class that a random linear teacher gives them."""
    draw = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(2000, 64, generator=draw), torch.randn(64, 10, generator=draw)
    return list(zip(x, (x @ teacher).argmax(1), strict=True))


def engine_of(shard):
    torch.manual_seed(0)
    parts = torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(96, 10)
    model = torch.nn.Sequential(*parts)
    shard(model)
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return lso.Engine.of(
        model, base, method=lso.SAM(rho=0.05), loss_fn=loss, max_grad_norm=1.0, total_samples=STEPS * BATCH
    )


# -- the heart: a training of one's own, which nodes may leave and join ------------------------------------------------


def main(folder: Path, endpoint: str) -> None:
    rows = taught_rows()

    def build(world):  # once in every generation, in the process group of those who are there
        return lso.elastic.Job(world=world, engine=engine_of(fully_shard), dataset=rows, collate=collate, on_step=note)

    def note(job, row):  # on all ranks, after every step
        waits = job.world.size < NODES  # so that nobody comes when all is done, also on a slow machine
        time.sleep(4 * PACE_S if waits else PACE_S)  # so that there is something to see
        if job.world.is_first:
            with (folder / "steps.jsonl").open("a") as out:
                out.write(json.dumps(row) + "\n")

    lso.elastic.run(
        build, {"endpoint": endpoint, "max_nodes": 4, "lease_s": 3.0}, output_dir=folder, microbatch_size=UNIT,
        reference=lso.elastic.Hyperparameters(global_batch_size=BATCH, learning_rate=3e-3),
    )  # fmt: skip


# -- the show ----------------------------------------------------------------------------------------------------------


def start(name: str, folder: Path, endpoint: str) -> subprocess.Popen[bytes]:
    """A node: a process tree of its own, as it would be on a machine of its own."""
    environment = {**os.environ, "ELASTIC_LSOPT_NODE": name, "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), endpoint], env=environment, stdout=log, stderr=log
        )


def losses(folder: Path) -> list[float]:
    """The loss of each step that was committed; where a step was done again, the last counts."""
    file = folder / "steps.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [loss for _, loss in sorted({row["step"]: row["loss"] for row in rows}.items())]


def show(folder: Path) -> None:
    """Start three nodes, kill one, add one; return when all have ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = {f"n{i + 1}": start(f"n{i + 1}", folder, endpoint) for i in range(NODES)}
    print(f"three nodes start; their logs and the journal: {folder}", flush=True)
    told = 0
    while any(node.poll() is None for node in nodes.values()):
        time.sleep(0.2)
        changes = lso.elastic.read_journal(folder)
        for change in changes[told:]:
            print(lso.elastic.Change(**change).line(), flush=True)
        told = len(changes)
        complete = bool(changes) and len(changes[-1]["nodes"]) == NODES
        if complete and len(losses(folder)) >= KILL_AT and nodes["n2"].poll() is None:
            print("kill -9 to node n2", flush=True)
            nodes["n2"].send_signal(signal.SIGKILL)
            nodes["n2"].wait()
        if changes and "n4" not in nodes and nodes["n2"].poll() is not None and "n2" not in changes[-1]["nodes"]:
            print("node n4 starts", flush=True)
            nodes["n4"] = start("n4", folder, endpoint)
    ended = {name: node.returncode for name, node in nodes.items()}
    assert ended == {"n1": 0, "n2": -signal.SIGKILL, "n3": 0, "n4": 0}, f"{ended}; see the logs in {folder}"


def compare(folder: Path) -> None:
    """The same training in one process, undisturbed; the largest difference of any step's loss."""
    engine = engine_of(lambda model: None)
    loader = lso.StepLoader(
        taught_rows(), collate, global_batch_size=BATCH, microbatch_size=UNIT, seed=0, rank=0, world=1,
        total_samples=STEPS * BATCH,
    )  # fmt: skip
    undisturbed, found = [engine.train_batch(units) for units in loader], losses(folder)
    assert len(found) == STEPS
    largest = max(abs(a - b) / b for a, b in zip(found, undisturbed, strict=True))
    worlds = " -> ".join(str(len(change["workers"])) for change in lso.elastic.read_journal(folder))
    print(f"workers: {worlds}; loss {found[0]:.3f} -> {found[-1]:.3f}")
    print(f"largest relative difference to the undisturbed run's loss, over {STEPS} steps: {largest:.1e}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="elastic-demo-") as name:
        show(Path(name))
        compare(Path(name))
