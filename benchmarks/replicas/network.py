"""Hosts of a benchmark as network namespaces, each with a link of so many Mbit/s in each direction.

The token bucket stands at both ends of a host's link: what it sends, and what the bridge hands to it. It needs `tc`
with the qdisc `tbf`; a delay (`netem`) is not asked for, as many kernels lack it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.netns import Network

BURST, QUEUE = "128kb", "100ms"


class Links(Network):
    """A context manager. `mbit` None: links as fast as the machine."""

    def __init__(self, hosts: Sequence[str], mbit: float | None = None) -> None:
        super().__init__(hosts)
        self._mbit = mbit

    def _make(self) -> None:
        super()._make()
        if self._mbit is None:
            return
        ends = [(self.space(host), "eth0") for host in self._number]
        ends += [(self.space("net"), f"port{i}") for i in self._number.values()]
        for space, device in ends:
            how = f"root tbf rate {self._mbit}mbit burst {BURST} latency {QUEUE}"
            subprocess.run(
                ["tc", "-netns", space, "qdisc", "add", "dev", device, *how.split()],
                check=True, capture_output=True, text=True,
            )  # fmt: skip


def sent_bytes(device: str = "eth0") -> int:
    """What has left this process's host by that device, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[8])
    raise OSError(f"no device {device} on this host")
