"""This process's TCP connections, found and shut down, whoever owns them."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress


def sockets() -> list[tuple[int, int, int | None, bool]]:
    """(file descriptor, local port, remote port or None, whether it listens) of this process's TCP sockets.

    The kernel's table of connections (/proc/net/tcp) would cost milliseconds: it is read through all of the machine's.
    """
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # its owner may have closed it meanwhile
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                        listens = bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                        found.append((int(fd), copy.getsockname()[1], _remote_port(copy), listens))
    return found


def _remote_port(connection: socket.socket) -> int | None:
    try:
        return connection.getpeername()[1]
    except OSError:
        return None


def shut_down(ports: Collection[int], *, keep: int = -1) -> None:
    """Shut down this process's connections that start or end at one of the ports, but for those of port `keep`.

    From any thread: whatever waits on one of them, a collective or a store's answer, raises at once.
    """
    for fd, local, remote, _ in sockets():
        if remote is not None and keep not in (local, remote) and (local in ports or remote in ports):
            # its owner may have closed it meanwhile
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
