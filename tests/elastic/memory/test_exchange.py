"""A peer that is killed in the middle of a large message, in real processes over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes.ranks import ROOT, free_port, rank_environment

PROGRAM = """
import sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.elastic.memory.exchange import wait_for_message
from elastic_lsopt.errors import PeerFailed

rank, port, receives = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "receives"
torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
transport, group = Transport(), dist.distributed_c10d._get_default_group()
message = torch.ones(2**28, dtype=torch.uint8)
sends = (rank == 0) != receives
work = group.send([message], 1 - rank, 0) if sends else group.recv([message], 1 - rank, 0)
print("under way", flush=True)
if rank == 1:
    time.sleep(100)
sys.stdin.readline()                                     # the peer is dead
threading.Timer(0.05, transport.sever).start()           # as the agent's word of it makes the worker do
begin = time.monotonic()
try:
    wait_for_message(work, lambda: transport.cut)
except (PeerFailed, RuntimeError) as error:
    print(f"{time.monotonic() - begin:.3f} {type(error).__name__}", flush=True)
    sys.stdout.flush()
import os
os._exit(0)
"""
"""Rank 0 lives; rank 1 is stopped as soon as it has begun and then killed, so the message is half read or written."""


@pytest.mark.timeout(90)
@pytest.mark.parametrize("receives", ["receives", "sends"])
def test_whoever_waits_for_a_half_read_message_is_freed(tmp_path: Path, receives: str) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(port), receives], cwd=ROOT, env=rank_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "under way\n"
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        ranks[1].kill()
        ranks[1].wait()
        said, _ = ranks[0].communicate("dead\n", timeout=70)
        seconds, error = said.split()
        assert float(seconds) < 1.0, f"waited {seconds} s for a message of a dead peer ({error})"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
