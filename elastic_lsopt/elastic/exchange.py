"""Between ranks: small values as JSON, compressed, never a pickle; and messages that a dead peer does not hold up.

[Note: a message that was half read] gloo (of torch 2.13) tells those who wait for a message that its connection broke,
but not where a part of the message had been read or written: they wait for the group's timeout, and neither `abort()`
nor `shutdown()` frees them. A large message is nearly always in that state when its sender is killed. So nobody waits
for one himself: a thread does, and whoever needs the message looks out for the cut as well and leaves the thread alone.
It keeps the message's buffer until the timeout.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.errors import PeerFailed

LOOK_S = 0.02
AFTER_CUT_S = 0.1
"""How long a message may still take once the transport is cut: one that had arrived counts."""
Cut = Callable[[], bool]
"""Whether this process has cut its transport, because a peer has gone."""


def never() -> bool:
    """The cut of a job whose peers do not go."""
    return False


def gather_json(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Every rank's `value` (JSON), in the group's order, on every rank (collective, two gathers; a gloo group).

    Raises TypeError where `value` is not JSON, before any communication.
    """
    own = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    sizes = [int(size) for size in _gather(group, torch.tensor([len(own)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    texts = _gather(group, padded)
    return [json.loads(zlib.decompress(t[:n].numpy().tobytes())) for t, n in zip(texts, sizes, strict=True)]


def _gather(group: dist.ProcessGroup, own: Tensor) -> list[Tensor]:
    out = [torch.empty_like(own) for _ in range(group.size())]
    group.allgather([out], [own]).wait()
    return out


def wait_for_message(work: dist.Work, cut: Cut) -> None:
    """Until a send or receive has ended. See [Note: a message that was half read].

    Raises gloo's RuntimeError where the message cannot come, PeerFailed AFTER_CUT_S after the cut.
    """
    errors: list[RuntimeError] = []
    ended = threading.Event()

    def wait() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            errors.append(error)
        ended.set()

    threading.Thread(target=wait, daemon=True, name="message").start()
    while not ended.wait(LOOK_S):
        if cut() and not ended.wait(AFTER_CUT_S):
            raise PeerFailed("a peer died in the middle of a message.")
    if errors:
        raise errors[0]
