"""Messages between ranks that a dead peer does not hold up.

[Note: a message that was half read] gloo (of torch 2.13) tells those who wait for a message that its connection broke,
but not where a part of the message had been read or written: they wait for the group's timeout, and neither `abort()`
nor `shutdown()` frees them. A large message is nearly always in that state when its sender is killed. So nobody waits
for one himself: a thread does, and whoever needs the message looks out for the cut as well and leaves the thread alone.
It keeps the message's buffer until the timeout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch.distributed as dist

from elastic_lsopt.errors import PeerFailed

LOOK_S = 0.02
AFTER_CUT_S = 0.1
"""How long a message may still take once the transport is cut: one that had arrived counts."""
Cut = Callable[[], bool]
"""Whether this process has cut its transport, because a peer has gone."""


def never() -> bool:
    """The cut of a job whose peers do not go."""
    return False


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
