"""Seeking the job where nobody answers as an agent does: the limit holds, and one line says what is there."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from elastic_lsopt.elastic.agent.node import find_the_job
from elastic_lsopt.elastic.mail.mailbox import ANSWER_S, CONNECT_S, Mailbox
from elastic_lsopt.errors import UserError
from tests.elastic.agent.plain_agent import node

pytestmark = pytest.mark.fast


def refuse(address: str) -> Mailbox:
    raise UserError(f"{address} is taken")


@pytest.mark.long
def test_a_listener_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(UserError, match="what listens there gives no answer of an agent for 1 s"):
            find_the_job(node(tmp_path, "n", 1, address, join_timeout_s=1.0), refuse)
        assert time.monotonic() - start < 1.0 + 2 * (CONNECT_S + ANSWER_S)
