"""A change of members that comes with the job's last step or after it: the end is saved, every step is made once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from elastic_lsopt.checkpoint.folder import latest
from elastic_lsopt.elastic.journal import read_journal
from tests.jobs import Started
from tests.ranks import free_port

STEPS = 12

LOOP = """
import json, os, pathlib, signal, sys, time
import torch
from torch.distributed.fsdp import fully_shard
import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for

folder, endpoint, event = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
node, name = os.environ["ELASTIC_LSOPT_NODE"], os.environ.get("ELASTIC_LSOPT_WORKER", "")
late = node == "n3" or event == "a worker comes" and name.endswith("-2")
rows = [(torch.randn(12, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(96)]
collate = lambda rows: (torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))
loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def build(world):
    while late and not (folder / "finishing").exists():
        time.sleep(0.02)                               # in its warm-up, until the others have made all steps
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(12, 5))
    backend = backend_for(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine = lso.Engine(backend, lso.Plain(), loss_fn=loss, total_samples=8 * STEPS)
    return lso.elastic.Job(
        world=world, engine=engine, dataset=rows, collate=collate, on_step=note, checkpoints=folder / "checkpoints",
        on_finish=lambda job: ((folder / "finishing").touch(), time.sleep(float(sys.argv[4]))),
    )

def note(job, row):
    with (folder / f"steps-{os.getpid()}.jsonl").open("a") as out:
        print(json.dumps(row), file=out)
    if event == "n2 leaves" and row["step"] == STEPS - 1 and node == "n2":
        os.kill(os.getppid(), signal.SIGTERM)          # this node is told to go
        time.sleep(1.0)                                # its agent says so, and the flag rides on the last step

reference = lso.elastic.Hyperparameters(global_batch_size=8, learning_rate=0.1)
alone = event == "a worker comes"
elastic = {"endpoint": endpoint, "address": "127.0.0.1", "min_nodes": 2 - alone}
lso.elastic.run(build, elastic, reference=reference, unit_size=2, output_dir=folder, workers=1 + alone)
""".replace("STEPS", str(STEPS))


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("event", "finish_s"), [("n2 leaves", 0.0), ("n3 joins", 5.0), ("a worker comes", 3.0)])
def test_a_change_at_the_end(tmp_path: Path, event: str, finish_s: float) -> None:
    """n2 leaves with the last step; n3, or a node's second worker, is let in while the others finish, and would wait
    for them for ever."""
    loop, folder, endpoint = tmp_path / "loop.py", tmp_path / "run", f"127.0.0.1:{free_port()}"
    folder.mkdir()
    loop.write_text(LOOP)

    def start(name: str) -> Started:
        job = [str(loop), str(folder), endpoint, event, str(finish_s)]
        return Started(["env", f"ELASTIC_LSOPT_NODE={name}", sys.executable, *job], tmp_path)

    names = ("n1",) if event == "a worker comes" else ("n1", "n2")
    nodes = [start(name) for name in names]
    try:
        if event == "n3 joins":
            nodes[0].until(lambda: len([*folder.glob("steps-*.jsonl")]) == 2)
            nodes.append(start("n3"))
        assert [node.wait() for node in nodes] == [0] * len(nodes), [node.output for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert latest(folder / "checkpoints") == folder / "checkpoints" / f"checkpoint-{STEPS}"
    notes = [json.loads(line) for file in folder.glob("steps-*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(row["step"] for row in notes) == sorted(len(names) * [*range(1, STEPS + 1)]), notes
    assert os.listdir(folder / "checkpoints") == [f"checkpoint-{STEPS}"] and len(read_journal(folder)) == 1
