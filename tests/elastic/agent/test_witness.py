"""The witness in a real etcd: one vote an instance, whoever asks first; a stranger's key is not believed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_lsopt.elastic.agent.witness import Witness
from elastic_lsopt.elastic.mail.mailbox import reachable
from elastic_lsopt.elastic.membership.generation import Change
from elastic_lsopt.elastic.membership.quorum import Ask, Ballot
from elastic_lsopt.errors import UserError
from tests.processes.ranks import free_port

SECRET = b"sixteen bytes ok"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An etcd takes connections before it serves, so its first answer may come late."""
    monkeypatch.setattr("elastic_lsopt.elastic.agent.witness.TIMEOUT_S", 60.0)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an etcd server of this test."""
    client, peer = free_port(), free_port()
    url, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    server = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "etcd"), "--data-dir", str(tmp_path_factory.mktemp("etcd")),
            "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peers,
            "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}", "--log-level", "error",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not reachable(f"127.0.0.1:{client}", 1.0):
        assert time.monotonic() < end and server.poll() is None, "etcd did not start"
        time.sleep(0.05)
    yield f"etcd://127.0.0.1:{client}"
    server.kill()
    server.wait(timeout=10)


def change(host: str) -> Change:
    return Change(why="a test", host=host, term=0, running=True)


def test_the_first_to_ask_gets_the_vote_and_keeps_it(etcd: str) -> None:
    witness = Witness(etcd, "one", SECRET)
    first = witness.ask(1, Ask(Ballot(1, "a"), change("a")))
    assert first.vote.accepted is not None and first.vote.accepted.change.host == "a"
    lower = witness.ask(1, Ask(Ballot(0, "z"), change("z")))
    assert lower == first
    higher = witness.ask(1, Ask(Ballot(2, "b")))
    assert higher.vote.promised == Ballot(2, "b") and higher.vote.accepted == first.vote.accepted


def test_of_ten_that_ask_at_once_all_see_one_vote_in_the_end(etcd: str) -> None:
    said: list[str] = []

    def ask(name: str) -> None:
        try:
            vote = Witness(etcd, "race", SECRET).ask(4, Ask(Ballot(1, name), change(name))).vote
        except OSError:  # the others always came first: no answer, no vote
            return
        if vote.accepted is not None and vote.accepted.ballot.name == name:
            said.append(name)

    threads = [threading.Thread(target=ask, args=(f"n{i}",)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = Witness(etcd, "race", SECRET).ask(4, Ask(Ballot(0, ""))).vote
    assert final.accepted is not None and final.accepted.ballot.name == max(said)


def test_a_key_under_another_secret_is_no_answer(etcd: str) -> None:
    Witness(etcd, "strange", b"another secret..").ask(1, Ask(Ballot(1, "x")))
    with pytest.raises(OSError, match="not this job's"):
        Witness(etcd, "strange", SECRET).ask(1, Ask(Ballot(1, "a")))


def test_no_etcd_is_no_answer_and_a_wrong_address_is_one_line() -> None:
    with pytest.raises(OSError, match="etcd at"):
        Witness(f"etcd://127.0.0.1:{free_port()}", "j", SECRET).ask(1, Ask(Ballot(1, "a")))
    with pytest.raises(UserError, match="must read etcd://host:port"):
        Witness("http://x", "j", SECRET)
