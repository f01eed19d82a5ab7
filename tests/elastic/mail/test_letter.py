"""Letters between agents: they come back, and what is no letter of this job is refused by name."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from elastic_lsopt.elastic.agent.status import read_status, say_status
from elastic_lsopt.elastic.mail.inbox import MOST_UNREAD_BYTES, Inbox
from elastic_lsopt.elastic.mail.letter import Letter, opened
from elastic_lsopt.elastic.mail.mailbox import UNREAD, Mailbox, connect
from elastic_lsopt.elastic.mail.signing import MAX_SKEW_S, Refused
from elastic_lsopt.elastic.membership import turn
from elastic_lsopt.elastic.membership.generation import Change, Member
from elastic_lsopt.elastic.membership.quorum import Accepted, Ask, Ballot, Vote
from elastic_lsopt.elastic.membership.record import Heartbeat, Record, Rules
from tests.elastic.membership.model import begin

pytestmark = pytest.mark.fast
SECRET = b"sixteen bytes ok"
CHANGE = Change("died: ä\n", "n", 3, running=True, joined=(Member("m", "h:2", ("m/a", "m/b")),))
FULL = Record(
    "n", "h:1", "j", Heartbeat(1, 2, 3.5), answer=True, number=4,
    vote=Vote(Ballot(3, "n"), Accepted(Ballot(3, "n"), CHANGE)), workers=("n/a",), leaving=("n/a",), broken=3,
    echo=Heartbeat(0, 1, 0.25), grants=True, ask=Ask(Ballot(3, "n"), CHANGE), change=CHANGE,
    fingerprint=(("code", "1"),), refusal="no\nreason",
)  # fmt: skip


@pytest.mark.parametrize("report", [None, {"workers": {"n/a": {"loss": 1.5}}, "text": "ü\n"}])
def test_a_letter_comes_back(report: Any) -> None:
    sealed = Letter(FULL, report, SECRET).sealed
    record, told = opened(sealed, SECRET)
    assert record == FULL and (told == b"" if report is None else b"1.5" in told)
    mac, _, text = sealed.partition(b" ")
    assert mac.decode() == hmac.new(SECRET, text, hashlib.sha256).hexdigest()


def test_strangers_changed_bytes_and_old_letters_are_refused() -> None:
    sealed = Letter(FULL, None, SECRET).sealed
    for bad in (Letter(FULL, None, b"another secret..").sealed, sealed[:-1] + b"!", b"", b"x" * 99):
        with pytest.raises(Refused, match="not signed with this job's secret"):
            opened(bad, SECRET)
    with pytest.raises(Refused, match="behind this node's clock"):
        opened(sealed, SECRET, now=time.time() + MAX_SKEW_S + 5)
    broken = Letter(replace(FULL, number="four"), None, SECRET)  # type: ignore[arg-type]
    with pytest.warns(UserWarning), pytest.raises(Refused, match=r"cannot be read: .*number"):
        opened(broken.sealed, SECRET)


def test_a_status_puts_reports_together_unread() -> None:
    said = say_status({"node": "a", "own": {"workers": {}}}, {"b\n": b'{"workers": {"b/x": {"step": 3}}}'}, SECRET)
    assert read_status(said, SECRET) == {
        "node": "a", "reports": {"a": {"workers": {}}, "b\n": {"workers": {"b/x": {"step": 3}}}}
    }  # fmt: skip
    with pytest.raises(Refused, match="cannot be read"):
        read_status(say_status({"node": "a", "own": {}}, {"b": b"{"}, SECRET), SECRET)


def test_more_letters_than_an_agent_gets_to_read_are_lost_and_do_not_fill_its_memory() -> None:
    waiting: list[Callable[[], None]] = []
    heard: list[Record] = []
    inbox = Inbox("n", SECRET, waiting.append, lambda letters: heard.extend(said for said, _ in letters))
    sealed = Letter(FULL, {"text": "x" * 2**20}, SECRET).sealed
    for _ in range(100):
        inbox.take_in(sealed)
    assert len(waiting) == 1, "all that are unread are read at once"
    waiting.pop()()
    assert len(heard) == MOST_UNREAD_BYTES // len(sealed) == 63
    inbox.take_in(sealed)
    waiting.pop()()
    assert len(heard) == 64, "it has room again once it has read"


def test_one_that_fetches_no_answers_is_given_no_more_than_its_queue_holds() -> None:
    mailbox = Mailbox("n", "127.0.0.1:0", lambda _: None, lambda _: None, silence_s=2.0)
    try:
        for i in range(UNREAD + 20):
            mailbox.answer("m", Letter(replace(FULL, number=i), None, SECRET))
        mailbox.answer("o", Letter(FULL, None, SECRET))
        while not mailbox.store.queue_len("to/o"):
            time.sleep(0.01)
        assert mailbox.store.queue_len("to/m") == UNREAD
        store = connect(mailbox.address)
        numbers = [opened(store.queue_pop("to/m"), SECRET)[0].number for _ in range(UNREAD)]
        assert numbers == list(range(UNREAD)), "in the order of the answers"
    finally:
        mailbox.close()


def test_a_beat_taken_the_short_way_does_what_the_long_way_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader's short way for records that only say "I live" changes neither state nor effects."""
    world = begin(3, Rules(1, 4, "j", {}, join_debounce_s=0.0))
    short, taken = turn.Turn._is_heartbeat, []

    def count(self: turn.Turn, record: Record, before: Record) -> bool:
        taken.append(short(self, record, before))
        return taken[-1]

    monkeypatch.setattr(turn.Turn, "_is_heartbeat", count)
    after = world.run(3.0)
    assert taken.count(True) > 10
    monkeypatch.setattr(turn.Turn, "_is_heartbeat", lambda *_: False)
    assert world.run(3.0) == after
