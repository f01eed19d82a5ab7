"""A node of the job: what its agent is told at its start, and how it finds the others."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent.event_file import EventFile
from elastic_lsopt.elastic.agent.lease_clock import lease_now
from elastic_lsopt.elastic.agent.node_folder import NodeFolder
from elastic_lsopt.elastic.agent.status import status_at
from elastic_lsopt.elastic.mail.mailbox import Mailbox, reachable
from elastic_lsopt.elastic.mail.signing import Refused
from elastic_lsopt.elastic.membership import machine
from elastic_lsopt.elastic.membership.record import Remembered, Rules
from elastic_lsopt.elastic.membership.state import State
from elastic_lsopt.errors import UserError

RETRY_S = 0.2
CONSONANTS = "bcdfghjklmnpqrstvwxz"


def new_life() -> str:
    """Six letters that tell one life of a node's agent from another's, in the names of its workers.

    A process id would not: in a container each life has the same one, and a worker's name is used once in a job.
    """
    return "".join(secrets.choice(CONSONANTS) for _ in range(6))


@dataclass(frozen=True, kw_only=True)
class Node:
    """What an agent is told at its start."""

    folder: NodeFolder
    rules: Rules
    settings: ElasticConfig
    secret: bytes
    endpoint: str | None
    """Where the job's first agent listens; None: this is it."""
    address: str
    """On which this node's store listens, host:port (port 0: any free one)."""
    workers: int
    command: Sequence[str]
    """Starts one worker."""
    environment: Mapping[str, str]
    exit_code_when_stopped: int = 0
    """Of an agent that was told to leave before the job's end."""

    @property
    def name(self) -> str:
        return self.folder.name


def begin(node: Node, listen: Callable[[str], Mailbox], events: EventFile) -> tuple[Mailbox, State]:
    """This node's mailbox, and the state from which it starts: founder, newcomer, or the member that it was."""
    remembered, now_s = node.folder.remembered(), lease_now()
    kept = None if remembered is None else Remembered.from_json(remembered)
    own = None if kept is None else kept.generation.member.get(node.name)
    if kept is not None and own is not None:
        with suppress(UserError):  # the others know this address; where another has it now, join anew
            mailbox = listen(own.address)
            state = machine.restarted(kept, mailbox.address, node.rules, now_s)
            events.begin(state, kept, now_s)
            return mailbox, state
    mailbox, first = find_the_job(node, listen)
    if first is None:
        state = machine.found(node.name, mailbox.address, node.rules)
    else:
        incarnation = time.time_ns() // 10**6  # a later life of this name has a later one
        state = machine.newcomer(node.name, mailbox.address, node.rules, first, incarnation)
    events.begin(state, None, now_s)
    return mailbox, state


def find_the_job(node: Node, listen: Callable[[str], Mailbox]) -> tuple[Mailbox, str | None]:
    """This node's mailbox, and the address of an agent of the job; None: there is none yet, this one founds it."""
    end, limit_s = time.monotonic() + node.settings.join_timeout_s, f"{node.settings.join_timeout_s:g} s"
    while True:
        fault = f"nobody answers there for {limit_s}, and it is no free address of this machine"
        for address in [node.endpoint, *node.folder.others()]:
            if address is not None and reachable(address):
                try:
                    status_at(address, node.secret)
                except Refused as error:
                    if address == node.endpoint:
                        raise UserError(f"elastic.endpoint={address}: {error}") from None
                except (OSError, RuntimeError):
                    if address == node.endpoint:
                        fault = f"what listens there gives no answer of an agent for {limit_s}"
                else:
                    return listen(node.address), address
        try:
            return listen(node.endpoint or node.address), None
        except UserError:  # the endpoint is another machine's, whose agent has not started yet
            if node.endpoint is None:
                raise
        if time.monotonic() > end:
            raise UserError(
                f"elastic.endpoint={node.endpoint}: {fault}; check the host name, the port, the firewall, and that "
                "the first node's agent runs."
            )
        time.sleep(RETRY_S)
