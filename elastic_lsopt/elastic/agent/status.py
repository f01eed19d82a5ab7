"""What an agent says of its job to whoever asks: a signed record in its own store, written anew twice a second."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from elastic_lsopt.elastic.mail.mailbox import connect
from elastic_lsopt.elastic.mail.signing import Refused, refuse_skew, seal, unseal

STATUS = "status"
ANSWER = timedelta(seconds=2)


def say_status(status: dict[str, Any], reports: Mapping[str, bytes], secret: bytes) -> bytes:
    """The signed record of `status`, whose "own" is this node's report, and of the others' `reports`, as they came.

    A thousand nodes' reports are a megabyte: they are put together unread, and read by whoever asks.
    """
    head = json.dumps({"at": time.time(), **status}, separators=(",", ":")).encode()
    lines = [json.dumps(name).encode() + b"\t" + report for name, report in reports.items()]
    return seal(b"\n".join([head, *lines]), secret)


def status_at(address: str, secret: bytes) -> dict[str, Any]:
    """What the agent that listens at `address` says of the job; "reports" by node.

    Raises OSError or RuntimeError where no agent answers, Refused where its secret or its clock is another.
    """
    store = connect(address, ANSWER)
    if not store.check([STATUS]):
        raise OSError(f"the agent at {address} has not said its status yet")
    return read_status(store.get(STATUS), secret)


def read_status(said: bytes, secret: bytes) -> dict[str, Any]:
    """What `say_status` was given. Raises Refused for what it did not write, or long ago."""
    head, *lines = unseal(said, secret).split(b"\n")
    try:
        status = json.loads(head)
        reports = {json.loads(name): json.loads(report) for name, _, report in (x.partition(b"\t") for x in lines)}
        at, own = float(status.pop("at")), {status["node"]: status.pop("own")}
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"a signed status cannot be read: {error}.") from None
    refuse_skew(at)
    return status | {"reports": reports | own}
