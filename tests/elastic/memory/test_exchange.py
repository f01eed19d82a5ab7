"""A peer that is killed in the middle of a large message, in real processes over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
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
if sends:
    print("stop the other", flush=True)
    sys.stdin.readline()                                 # whoever receives has asked for the message and is stopped
work = group.send([message], 1 - rank, 0) if sends else group.recv([message], 1 - rank, 0)
print("under way", flush=True)
sys.stdin.readline()                                     # rank 1 is dead
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
"""Rank 0 lives, rank 1 is killed. Whoever receives is stopped before anything is sent, so that the sender fills what
the system keeps of a connection and no more: the message is half written and half read, however fast the machine is."""


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
    receiver, sender = ranks if receives == "receives" else reversed(ranks)
    try:
        assert said_by(sender) == "stop the other"
        assert said_by(receiver) == "under way"
        receiver.send_signal(signal.SIGSTOP)
        tell(sender, "stopped")
        assert said_by(sender) == "under way"
        ranks[1].kill()
        ranks[1].wait()
        ranks[0].send_signal(signal.SIGCONT)
        said, _ = ranks[0].communicate("dead\n", timeout=70)
        seconds, error = said.split()
        assert float(seconds) < 5.0, f"waited {seconds} s for a message of a dead peer ({error})"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def said_by(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


def tell(rank: subprocess.Popen[str], word: str) -> None:
    assert rank.stdin is not None
    rank.stdin.write(word + "\n")
    rank.stdin.flush()
