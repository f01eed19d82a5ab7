"""Other hosts: their names, whether they can be reached, their clocks; this host's ports; the job's store.

A host of a hostfile is reached as its launcher reaches it, by ssh, and its clock asked there. All hosts are asked at
once, so a hundred that do not answer take as long as one.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from elastic_lsopt.cli.doctor.finding import Finding, fail, ok, warn
from elastic_lsopt.elastic.mail.mailbox import reachable, split_address
from elastic_lsopt.elastic.mail.signing import MAX_SKEW_S
from elastic_lsopt.errors import UserError

SSH_PORT = 22
PORTS = {29400: "the agents' endpoint in launch/", 29500: "torchrun's and DeepSpeed's own"}
SSH_S, ALL_S = 6.0, 15.0
WIDE_SKEW_S = 5.0


def hosts_of(hostfile: Path) -> list[str]:
    """The host names of a hostfile, one per line before its `slots=`. Raises UserError for a file without any."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--hostfile {hostfile} cannot be read: {reason}.") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            if not re.fullmatch(r"[\w.:-]+", words[0]) or any("=" not in word for word in words[1:]):
                raise UserError(f"{hostfile}:{number}: {line.strip()!r} must read `host slots=1`.")
            hosts.append(words[0])
    if not hosts:
        raise UserError(f"--hostfile {hostfile} names no host; write one per line, such as `node-1 slots=1`.")
    return list(dict.fromkeys(hosts))


def look_at_hosts(hosts: Sequence[str]) -> Iterator[Finding]:
    """Each host's name, its ssh and its clock, in at most ALL_S."""
    answers: dict[str, Finding] = {}

    def look(host: str) -> None:
        answers[host] = _look_at_host(host)

    # Daemons: the look-up of a name has no timeout, and a command does not wait for it at its end.
    threads = [threading.Thread(target=look, args=[host], daemon=True) for host in hosts]
    end = time.monotonic() + ALL_S
    for thread in threads:
        thread.start()
    for host, thread in zip(hosts, threads, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        yield answers.get(host) or fail(
            f"host {host}", f"no answer within {ALL_S:g} s", "check its name, the network, the firewall"
        )


def _look_at_host(host: str) -> Finding:
    what = f"host {host}"
    try:
        address = socket.getaddrinfo(host, SSH_PORT, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return fail(what, "its name is not known here", "write its address, or add it to /etc/hosts or the DNS")
    if not reachable(f"{host}:{SSH_PORT}"):
        return fail(
            what, f"{address} cannot be reached at port {SSH_PORT}",
            "start it, open the port in its firewall, or take it out of the hostfile",
        )  # fmt: skip
    skew_s = _skew_s(host)
    if skew_s is None:
        return warn(what, f"{address} is reached, but ssh gives no shell without a password", f"ssh-copy-id {host}")
    return judged(what, str(address), skew_s)


def judged(what: str, address: str, skew_s: float) -> Finding:
    """A host whose clock is so far ahead of this one's."""
    found = f"{address}, its clock {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > MAX_SKEW_S:
        return fail(what, f"{found}, the limit is {MAX_SKEW_S:g} s", "set both clocks by NTP")
    return ok(what, found) if abs(skew_s) < WIDE_SKEW_S else warn(what, found, "set both clocks by NTP")


def _skew_s(host: str) -> float | None:
    """That host's clock less this one's; None: it cannot be asked."""
    if shutil.which("ssh") is None:
        return None
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S:.0f}", host, "date", "+%s.%N"]
    before = time.time()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SSH_S, check=False
        )
        return float(done.stdout) - (before + time.time()) / 2 if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def look_at_ports() -> Iterator[Finding]:
    """Whether this host's name is its own, and the usual ports are free."""
    name = socket.gethostname()
    try:
        yield ok("own name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        yield warn("own name", f"{name} is not known here", "add it to /etc/hosts; gloo and NCCL look it up")
    for port, whose in PORTS.items():
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            yield warn(f"port {port}", f"{error.strerror} ({whose})", "end what listens there, or choose another port")
        else:
            yield ok(f"port {port}", f"free ({whose})")


def look_at_store(store: str) -> Finding:
    """Whether somebody listens at host:port, or etcd at etcd://host:port."""
    address = f"{urlsplit(store).hostname}:{urlsplit(store).port}" if store.startswith("etcd://") else store
    try:
        split_address(address)
    except (UserError, ValueError):
        raise UserError(f"--store {store} must read host:port or etcd://host:port.") from None
    what = f"store {store}"
    if not reachable(address):
        return fail(what, "nobody listens there", "start the first node's agent or etcd, check host, port and firewall")
    return ok(what, "is reached")
