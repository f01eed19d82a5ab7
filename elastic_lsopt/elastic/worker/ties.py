"""What ties this worker to its peers while a generation lives; whoever may cut them, from whatever thread.

See runtime.py, [Note: a broken generation].
"""

from __future__ import annotations

import time

from elastic_lsopt.backends.fabric.sockets import shut_down
from elastic_lsopt.backends.transport import Transport


class Ties:
    """The sockets of one generation. They hold nothing before the first call; `sever` may come at any moment."""

    def __init__(self) -> None:
        self.broken_since: float | None = None
        """When the generation broke, by the monotonic clock; None: it has not."""
        self._transport: Transport | None = None
        self._store_port = 0

    def meet_in(self, port: int) -> None:
        """The group is being formed in the store behind this port."""
        self._store_port = port

    def talk_by(self, transport: Transport) -> None:
        """The group is formed, and talks by this."""
        self._transport = transport

    @property
    def severed(self) -> bool:
        """Whether the group's sockets were cut here."""
        return self._transport is not None and self._transport.cut

    def library_error(self) -> str:
        """What the communication library says went wrong, where it keeps a word of its own; before a cut."""
        return "" if self._transport is None or self.severed else self._transport.fabric.error()

    def cut(self) -> bool:
        """Whether this generation is over by force."""
        return self.broken_since is not None

    def sever(self) -> None:
        """Cut all of them: whatever waits for a peer raises at once."""
        if self.broken_since is None:
            self.broken_since = time.monotonic()
        if (transport := self._transport) is not None:
            transport.sever()
        if self._store_port:  # a group that is being formed waits in the store for one who will not come
            shut_down({self._store_port})
