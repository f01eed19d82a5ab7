"""Whose fault an error is: a worker's own mistake must end it, not form one generation after another."""

from __future__ import annotations

import errno

import pytest
import torch.distributed as dist

from elastic_lsopt.elastic.worker.fault import is_peers
from elastic_lsopt.errors import PeerFailed, UserError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("error", "peers"),
    [
        (PeerFailed("rank 1 raised"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (TimeoutError("a store that does not answer"), True),
        (dist.DistNetworkError("the store is gone"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (UserError("learning_rate=-1"), False),
        (FileNotFoundError(errno.ENOENT, "no such file", "data.bin"), False),
        (OSError(errno.ENOSPC, "no space left on device"), False),
        (ValueError("Timed out, says a user's own code"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else str(x),
)
def test_by_the_error_alone(error: Exception, peers: bool) -> None:
    assert is_peers(error, severed=False) == peers


def test_after_the_cut_any_collective_fails() -> None:
    assert is_peers(RuntimeError("whatever a collective says"), severed=True)
    assert not is_peers(KeyError("a user's"), severed=True)
