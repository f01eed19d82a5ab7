"""Whose fault an error in a worker is: a peer's end, after which the others form anew, or this program's own."""

from __future__ import annotations

import errno

import torch.distributed as dist

from elastic_lsopt.errors import PeerFailed, UserError

UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)
GLOO = (
    "Connection closed by peer", "Connection reset", "gloo", "Broken pipe", "Timed out", "Socket", "recvBytes",
    "pair closure", "Remote peer closed",
)  # fmt: skip
"""What torch's messages say when a peer, and not this program, has failed (they are plain RuntimeErrors; a send over a
pair on which a message has timed out says no more than "Application timeout caused pair closure")."""


def is_peers(error: Exception, *, severed: bool) -> bool:
    """Whether an error comes from a peer's end; `severed`: this worker has cut its transport, so its collectives fail.

    A file that is missing and a full disk are OSErrors too, but this worker's own.
    """
    if isinstance(error, PeerFailed | UserError):
        return isinstance(error, PeerFailed)
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in UNREACHABLE
    network = isinstance(error, dist.DistError) or severed or any(sign in str(error) for sign in GLOO)
    return isinstance(error, RuntimeError) and network


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
