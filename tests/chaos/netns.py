"""Hosts as network namespaces: a cluster whose nodes talk over a bridge, where packets can be lost from any to any.

    lso<pid>-net      a bridge; a port for each host
    lso<pid>-n1 …     eth0 (10.77.0.1 …) and lo, nothing else: this machine's own network is not touched

[Note: how packets are lost] Each host knows the others' link addresses from a fixed table (no ARP). To lose what A
sends to B, A's entry for B gets an address that nobody has: the packets leave A and no one takes them. So one
direction of one pair can be lost, no side gets an error (as from a link that is down or a route that is missing), and
connections stay open and hang, which is what a broken network does to them. It needs no packet filter, only `ip` and
the right to use it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, Self

from tests.chaos.cluster import Cluster
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import Popen

NOBODY = "02:00:00:00:ff:ff"
PORT = 29400
ETCD_PORT, ETCD_PEER_PORT = 2379, 2380


class Network:
    """Network namespaces by host name, joined by a bridge; a context manager that removes them."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._number = {host: i for i, host in enumerate(hosts, 1)}
        self._prefix = f"lso{os.getpid()}"

    @staticmethod
    def missing() -> str | None:
        """Why there can be no network namespaces here, None where they work."""
        if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("nsenter") is None:
            return "network namespaces need Linux with `ip` (iproute2) and `nsenter` (util-linux)"
        try:
            with Network(("probe-1", "probe-2")):
                return None
        except subprocess.CalledProcessError as error:
            return f"network namespaces cannot be made here: {error.stderr.strip()}"

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._number, "net"):
            with suppress(subprocess.CalledProcessError):
                _ip(f"netns delete {self.space(name)}")

    def _make(self) -> None:
        net = self.space("net")
        _ip(f"netns add {net}", *(f"netns add {self.space(host)}" for host in self._number))
        ports = [
            f"link add port{i} type veth peer name eth0 address {_link(i)} netns {self.space(host)}"
            for host, i in self._number.items()
        ]
        up = [f"link set port{i} master bridge up" for i in self._number.values()]
        _ip("link add bridge type bridge", "link set bridge up", *ports, *up, space=net)
        for host, i in self._number.items():
            _ip(
                "link set lo up",
                "link set eth0 addrgenmode none",  # no IPv6: gloo would take it for the interface's address
                "link set eth0 up",
                f"address add {self.address(host)}/24 dev eth0",
                *(_neighbour(self.address(other), _link(j)) for other, j in self._number.items() if j != i),
                space=self.space(host),
            )

    def space(self, host: str) -> str:
        """The namespace's name."""
        return f"{self._prefix}-{host}"

    def address(self, host: str) -> str:
        """The host's IP address."""
        return f"10.77.0.{self._number[host]}"

    def inside(self, host: str) -> list[str]:
        """What stands before a command that runs on this host, as the same process."""
        return ["nsenter", f"--net=/run/netns/{self.space(host)}"]

    # -- what a driver does ------------------------------------------------------------------------------------

    def lose(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """From now on what `sources` send to `targets` is lost. See [Note: how packets are lost]."""
        for source, target in product(sources, list(targets)):
            _ip(_neighbour(self.address(target), NOBODY), space=self.space(source))

    def cut(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Lose what goes between the two sides, both ways."""
        self.lose(one, other)
        self.lose(other, one)

    def heal(self) -> None:
        """Every packet arrives again."""
        for source in self._number:
            others = [(self.address(other), _link(j)) for other, j in self._number.items() if other != source]
            _ip(*(_neighbour(address, link) for address, link in others), space=self.space(source))


def _link(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def _neighbour(address: str, link: str) -> str:
    return f"neighbour replace {address} lladdr {link} dev eth0 nud permanent"


def _ip(*commands: str, space: str | None = None) -> None:
    """Run `ip` commands, in a namespace. Raises CalledProcessError with what `ip` said."""
    where = [] if space is None else ["-netns", space]
    lines = "".join(f"{command}\n" for command in commands)
    subprocess.run(["ip", *where, "-batch", "-"], input=lines, check=True, capture_output=True, text=True)


class SplitCluster(Cluster):
    """A `Cluster` each of whose nodes n1, n2 … is a host of `network`; n1 is the endpoint."""

    def __init__(self, folder: Path, network: Network, *, save_steps: int, **settings: Any) -> None:
        super().__init__(folder, endpoint=f"{network.address('n1')}:{PORT}", **settings)
        self.network = network
        self._settings.write_text(json.dumps(json.loads(self._settings.read_text()) | {"save_steps": save_steps}))

    def __enter__(self) -> Self:
        return self

    def start(self, again: str | None = None) -> str:
        """A new node, or the agent of a node that has died; its name."""
        self._count += again is None
        name = again or f"n{self._count}"
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = Popen(
                [
                    *self.network.inside(name), sys.executable, "-W", "ignore", "-m", "tests.chaos.job",
                    str(self._settings),
                ],
                cwd=ROOT, stdout=log, stderr=log,
                env=rank_environment(ELASTIC_LSOPT_NODE=name, GLOO_SOCKET_IFNAME="eth0"),
            )  # fmt: skip
        return name

    def workers_of(self, *nodes: str) -> dict[str, int]:
        """Living workers of these nodes: name -> pid."""
        return {worker: pid for worker, pid in self.workers().items() if worker.partition("/")[0] in nodes}

    def rows_of(self, pid: int) -> int:
        """How many steps this worker has finished."""
        file = self.folder / f"steps-{pid}.jsonl"
        return len(file.read_bytes().splitlines()) if file.exists() else 0


class Etcd:
    """An etcd server on one host of a network; `address` is what `elastic.witness` takes. A context manager."""

    def __init__(self, folder: Path, network: Network, host: str) -> None:
        self.address = f"etcd://{network.address(host)}:{ETCD_PORT}"
        self._folder, self._network, self._host = folder, network, host

    def __enter__(self) -> Etcd:
        url, peers = (f"http://{self._network.address(self._host)}:{port}" for port in (ETCD_PORT, ETCD_PEER_PORT))
        inside = self._network.inside(self._host)
        self._server = subprocess.Popen(
            [
                *inside, str(Path(sys.executable).parent / "etcd"), "--data-dir", str(self._folder),
                "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peers,
                "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}",
                "--log-level", "error", "--unsafe-no-fsync",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait(timeout=10)
