"""What gloo itself says to a rank that sends over a broken pair is a peer's fault, and not this worker's end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from elastic_lsopt.elastic.worker.fault import is_peers


def test_a_send_after_a_message_that_did_not_come() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        group, peer = pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30)), range(2))
    message = torch.zeros(2**20, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as late:
        group.recv([message], 1, 0).wait(timedelta(seconds=1))
    with pytest.raises(RuntimeError) as broken:
        group.send([message], 1, 0).wait()
    assert "gloo" not in str(broken.value), "gloo names itself now, so another message is to be tried"
    assert is_peers(late.value, severed=False) and is_peers(broken.value, severed=False), str(broken.value)
    del peer
