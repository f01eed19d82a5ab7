"""One replica of one rank that steps, meets the others each tau steps, and says when: `python -m … ORDER`.

A step sleeps for as long as it is told, so that more replicas than cores are as fast as few. A replica that was killed
and is started again (`life` > 0) has nothing, and asks to be given the model before its first step.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.replicas.consensus import Consensus, Exchanged
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.consensus import registry
from elastic_lsopt.oracle.oracle import Oracle
from tests.cases import engines


class Telling(Consensus):
    """Consensus that says of each meeting when this replica came, when it ended, who was in, and what was counted."""

    steps_since = 0
    """The last exchange that went well."""

    def exchange(self, oracle: Oracle | None, *, beside: bool = False) -> Exchanged | None:
        came = time.time()
        met = super().exchange(oracle, beside=beside)
        if met is None:
            say(missed=True, came=came)
            return met
        counted = self.steps_since if met.well and self.number in met.fit else 0
        say(met=met.number, came=came, members=met.members, well=met.well, counted=counted)
        if met.well:
            self.steps_since = 0
        return met


def say(**what: Any) -> None:
    print(json.dumps({"at": time.time(), **what}), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    number, replicas, life = order["number"], order["replicas"], order["life"]
    store = dist.TCPStore("127.0.0.1", order["port"], is_master=False, timeout=timedelta(seconds=60))
    groups = dist.PrefixStore(f"groups/{life}", store)
    form_replicas(groups, number, [1] * replicas, timedelta(seconds=60), apart=True)
    consensus = Telling(
        registry.build("local_sgd", tau=order["tau"]), dist.PrefixStore("consensus", store),
        replicas=tuple(range(replicas)), timeout_s=order["timeout_s"], newcomer=life > 0,
    )  # fmt: skip
    net = engines.net()
    net.register_forward_pre_hook(lambda *_: time.sleep(order["step_s"]))
    engine = engines.build("ddp", net, lso.Plain(), base=lambda p: torch.optim.SGD(p, lr=1e-3), consensus=consensus)
    [step] = engines.batches(1, replicas)
    batch = [lso.MicroBatch(number, step[number], place=0)]
    say(there=True)
    if life:
        while (met := consensus.exchange(None)) is None or not met.well:
            pass
    else:
        store.get("begin")
    while True:
        engine.train_batch(batch)
        consensus.steps_since += 1
        say(step=True)


if __name__ == "__main__":
    main()
