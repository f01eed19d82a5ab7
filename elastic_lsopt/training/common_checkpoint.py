"""From which checkpoint a job of replicas goes on: each has its own, and all must be of one exchange."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from elastic_lsopt.checkpoint.folder import CONTENTS, read_json
from elastic_lsopt.errors import UserError

START_S = 600.0
"""How long replicas wait for each other's word at the start: a model may take minutes to load."""
LOOK_EVERY_S = 0.02
Saved = tuple[str, list[int]]
"""A ledger's digest, and who was at the exchange."""


def of_the_exchange(checkpoint: Path) -> Saved:
    """Which ledger of samples it goes on from, by its digest, and the members of that exchange: the same in every
    replica's checkpoint of one exchange, and in no other's."""
    extra = read_json(checkpoint / CONTENTS)["facts"]["extra"]
    ledger = json.dumps(extra.get("loader", {}).get("ledger"), sort_keys=True)
    return hashlib.blake2b(ledger.encode(), digest_size=8).hexdigest(), extra.get("members", [])


def agreed(store: dist.Store, number: int, numbers: Sequence[int], own: dict[int, Saved]) -> int:
    """The name that replica `number` goes on from, which has `own` ones; -1: none has any; 0: others have one, this one
    has not.

    It is the newest of those that all have who were at its exchange and are here (`numbers`), else the newest that most
    of them have: where only some had saved when the job was killed, the one before is everybody's. Raises UserError
    where one has failed, or has not come within START_S.
    """
    store.set(f"saved/{number}", json.dumps(own))
    end = time.monotonic() + START_S
    while not store.check([f"saved/{r}" for r in numbers]):
        if gone := [r for r in numbers if store.check([f"gone/{r}"])]:
            raise UserError(f"replica {gone[0]} has failed before the first step, and says why.")
        if time.monotonic() > end:
            raise UserError(f"not all of the {len(numbers)} replicas have come within {START_S:g} s; start them all.")
        time.sleep(LOOK_EVERY_S)
    everyones = [json.loads(store.get(f"saved/{r}")) for r in numbers]
    held = Counter((int(name), ledger) for theirs in everyones for name, (ledger, _) in theirs.items())
    if not held:
        return -1
    members = {(int(name), ledger): m for theirs in everyones for name, (ledger, m) in theirs.items()}

    def rank(saved: tuple[int, str]) -> tuple[float, int, str]:
        here = sum(m in numbers for m in members[saved])
        return min(1.0, held[saved] / max(1, here)), *saved

    name, ledger = max(held, key=rank)
    return name if name in own and own[name][0] == ledger else 0
