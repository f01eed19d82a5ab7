"""What an agent says of its job to whoever asks: a signed record in its own store, written anew twice a second."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from elastic_lsopt.elastic.mailbox import connect
from elastic_lsopt.elastic.signing import verified

STATUS = "status"
ANSWER = timedelta(seconds=2)


def status_at(address: str, secret: bytes) -> dict[str, Any]:
    """What the agent that listens at `address` says of the job.

    Raises OSError or RuntimeError where no agent answers, Refused where its secret or its clock is another.
    """
    store = connect(address, ANSWER)
    if not store.check([STATUS]):
        raise OSError(f"the agent at {address} has not said its status yet")
    return verified(store.get(STATUS), secret)
