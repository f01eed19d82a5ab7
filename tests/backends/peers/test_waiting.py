"""Who waits for a peer that does not come, in an exchange that others know to have failed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from elastic_lsopt.backends.peers.formats import format_of
from elastic_lsopt.backends.peers.intervals import bundles
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.errors import PeerFailed

pytestmark = pytest.mark.fast
NUMBERS = 1000


@pytest.mark.parametrize("what", ["sums", "from_leader", "numbers"])
def test_who_waits_hears_that_the_exchange_has_failed(what: str) -> None:
    """Member 1 lives, its connections are open, and it does not come."""
    store, failed = dist.HashStore(), threading.Event()
    cuts = {(member, 0): [(0, 0, NUMBERS)] for member in range(2)}

    def make(member: int) -> Peers:
        made = Peers((member, 0), (0, 1), bundles((member, 0), cuts, (0, 1)), store, timedelta(seconds=60))
        made.limit(timedelta(seconds=60), failed.is_set)
        return made

    with ThreadPoolExecutor(2) as threads:
        waiting, absent = threads.map(make, range(2))
        parts = [torch.ones(NUMBERS)]
        acts = {
            "sums": lambda: waiting.sums(parts, format_of(32)), "from_leader": lambda: waiting.from_leader(parts, 1),
            "numbers": lambda: waiting.numbers(torch.ones(1)),
        }  # fmt: skip
        act = threads.submit(acts[what])
        time.sleep(0.3)
        assert not act.done()
        failed.set()
        begin = time.monotonic()
        with pytest.raises(PeerFailed, match="another has found"):
            act.result(20.0)
        assert time.monotonic() - begin < 5.0
    for peers in (waiting, absent):
        peers.close()
