"""One rank of a job of replicas that is disturbed at a named point: `python -m tests.consensus.replica_process ORDER`.

It takes a step of 0.05 s and meets, over and over, and says of each meeting: its number, who was in, whether it went
well, how long it took, and the weights after it, whose first element says how they came about.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.backends.peers.meeting import Meetings
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.consensus import registry
from tests.cases import engines
from tests.cases.replicas import dealt, place_of

POINTS: dict[str, tuple[type, str, str]] = {
    "before": (Meetings, "begin", "before"), "decided": (Meetings, "begin", "after"),
    "inside": (Peers, "_to_each", "after"), "between": (Peers, "_to_all", "after"),
    "voting": (Meetings, "end", "before"), "voted": (Meetings, "end", "after"),
}  # fmt: skip
"""Where a process may be ended: before or after a call of this method."""


def disturb(point: str, at: int, how: str) -> None:
    """In the meeting number `at` of this process's life, at this point: kill, or stop for a while."""
    kind, name, when = POINTS[point]
    inner: Callable[..., Any] = getattr(kind, name)
    seen = {"meetings": 0}
    begin = Meetings.begin

    def counting(self: Any, *args: Any, **more: Any) -> Any:
        seen["meetings"] += 1
        return begin(self, *args, **more)

    def struck() -> None:
        if seen["meetings"] == at - (point == "before"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    def outer(*args: Any, **more: Any) -> Any:
        if when == "before":
            struck()
        out = inner(*args, **more)
        if when == "after":
            struck()
        return out

    Meetings.begin = counting  # type: ignore[method-assign]
    if name == "begin":
        inner = counting
    setattr(kind, name, outer)


def main() -> None:
    order = json.loads(sys.argv[1])
    rank, sizes = order["rank"], order["sizes"]
    number, own = place_of(rank, sizes)
    store = dist.TCPStore("127.0.0.1", order["port"], is_master=False, timeout=timedelta(seconds=30))
    form_replicas(dist.PrefixStore("groups", store), rank, sizes, timedelta(seconds=30), apart=True)
    consensus = Consensus(
        registry.build("local_sgd", tau=1), dist.PrefixStore("consensus", store), replicas=tuple(range(len(sizes))),
        timeout_s=order["timeout_s"],
    )  # fmt: skip
    engine = engines.build(order["kind"], engines.net(), lso.Plain(), consensus=consensus)
    if order.get("point"):
        disturb(order["point"], order["at"], order["how"])
    store.add("there", 1)
    while store.add("there", 0) < sum(sizes):  # whoever starts slowly is not late
        time.sleep(0.01)
    [step] = engines.batches(1, 2 * sum(sizes))
    for turn in range(order["turns"]):
        time.sleep(0.05)
        begin = time.monotonic()
        engine.train_batch(dealt(step, sizes, number, own))
        took_s = time.monotonic() - begin
        whole = engines.whole(engine.space)
        met = consensus.exchanges[-1] if consensus.exchanges else None
        print(json.dumps({
            "turn": turn, "took_s": took_s, "at": [float(t.double().sum()) for t in whole.values()],
            "met": [met.number, list(met.members), met.well] if met is not None else None,
            "why": met.why if met is not None else "",
        }), flush=True)  # fmt: skip
    os._exit(0)


if __name__ == "__main__":
    main()
