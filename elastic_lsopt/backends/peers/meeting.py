"""Who is at an exchange, and whether it went well: the same answer on every rank of every member, or none.

    ready     the first rank of each replica says that it is there, with a report
    in        who is in: the first of them to see all, or its patience end, writes it (compare-and-set)
    …         collectives into buffers of their own
    done      each member votes inside, because one rank's peers may be there and another's gone, and says how
    verdict   "all" or "keep" (compare-and-set), by the first to hear of all, of one that failed or that its peers miss,
              or the deadline
    then all commit what they have heard, or none does.

[Note: one deadline] A replica waits for others to come at most half of `timeout_s`, so that an exchange without them
has the other half; all of it takes no longer than `timeout_s` from this replica's own arrival. One that has nothing
else to do, because it is new or has no samples left, may wait longer for the decision (`patience_s`). A replica that is
late finds a decision without itself. Numbers are the job's own and not a replica's count, or it would wait in meetings
that are over.

[Note: who is waited for] Those who were at the last meeting that went well, or who voted at one that did not. Others
may come at any time and are taken in, but nobody waits for them: so a replica that hangs costs the deadline once. But
a replica that has missed a meeting waits for all, at most `late_s` longer: it is out of step with them, and if it went
on alone it would be so for ever. One that has lost a rank says so (`leave`) by any of the others, and costs nothing.

[Note: told to stop] A replica that is told to stop while it waits takes its word back, unless it is in: where the whole
job is told so, none of them counts what the others do not know of.

[Note: a store that dies] In an elastic job the store's host may die, and another takes its place (`outdated` is given
then). A meeting that loses it is over, as if it had not been: nobody waits, and who may have heard the verdict is known
by the ledger, which then says that the others' samples are not theirs any more.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.errors import PeerFailed, UserError

LOOK_EVERY_S, SELDOM_S = 0.002, 0.02
"""How often a replica that waits asks the store: more seldom the longer it has waited, after each twentieth of that."""
LEAST_S = 0.05
"""What is left for a phase that begins at the deadline."""
SLOW_S = 0.1
"""By so much later than others a replica that lives may hear that a meeting has failed, and vote."""
LOST, OUTDATED, OVER, SILENT = "lost", "outdated", "over", "silent"
BEAT_S, SILENT_S = 5.0, 600.0
"""How often a replica that takes steps gives a sign of life, and how long one that waits for its model may miss all of
them; a step takes less."""
KEPT = 2
"""Meetings whose keys stay in the store: a late replica may still read them."""
SLICE_S = 5.0
"""How often a replica's other ranks hear from the first that it still waits, however long: their group's time limit is
for a rank that is silent."""
NOTHING = "-"
"""What no key holds."""


@dataclass(frozen=True)
class Met:
    """A meeting under way: its number in the job, who is in, what each of them has reported, and what they share: the
    newest that any of them has brought."""

    number: int
    members: tuple[int, ...]
    reports: Mapping[int, Any]
    common: Any


class _Outdated(Exception):
    """This replica's members are about to change, so that waiting for others must end."""


class Meetings:
    """One rank's part in the meetings of its replica with the others (every method is collective in the replica).

    `inside` is a gloo group of the replica's own ranks (None: it has one). `store` is the job's; its own time limit is
    that of a replica that has lost the store. `since` is the number of the first meeting there. `lost` says of a
    replica what it cannot say itself: that all its ranks are gone.
    """

    def __init__(
        self, store: dist.Store, number: int, expected: Iterable[int], *, first: bool,
        inside: dist.ProcessGroup | None, timeout_s: float, outdated: Callable[[], bool] | None = None,
        lost: Callable[[int], bool] | None = None, told_to_stop: Callable[[], bool] = lambda: False, since: int = 0,
    ) -> None:  # fmt: skip
        self._outdated, self.lost, self._since, self._told_to_stop = outdated, lost, since, told_to_stop
        self.stops = False
        """Whether a rank of this replica had been told to stop when the last meeting began (alike on all of them)."""
        self._store, self.number, self._expected = store, number, set(expected)
        self._first, self._inside, self.timeout_s = first, inside, timeout_s
        self._come = self._end = 0.0
        self._signs: tuple[float, Any] = 0.0, None
        """Since when the signs of life of the others are these."""
        self._beat_s = 0.0
        self.over = False
        """The others have ended the job while this replica was away (alike on all its ranks)."""
        self._last: int | None = None
        """The meeting at which this replica was last."""
        self._failed: tuple[Met, float] | None = None
        """That one, if it did not go well, and until when its votes may come."""

    @property
    def left(self) -> timedelta:
        """Of this meeting's time."""
        return timedelta(seconds=max(LEAST_S, self._end - time.monotonic()))

    def begin(
        self, report: Any, common: Any = None, *, version: int = -1, patience_s: float = 0.0, late_s: float = 0.0
    ) -> Met | None:  # fmt: skip
        """Say that this replica is there, and learn who is in; None where the others began without it.

        Raises UserError where it would wait for ever and no other gives a sign of life, PeerFailed where its members
        are about to change. All members take over `common` of the highest `version` (below 0: this replica has none).
        `patience_s`: so much longer this replica may wait for the decision; `late_s`: if it has missed one.
        """
        gather_json(self._inside, None)  # all of it is there, or it is not there at all
        self._start(patience_s)
        arrive = partial(self._arrive, report, common, version, patience_s, late_s)
        k, told, self.stops = self._asked(arrive) if self._first else 0, None, False
        while told is None:
            heard = self._heard_of(k) if self._first else None
            everyones = gather_json(self._inside, [heard, self.stops or self._told_to_stop()])
            told, stops = everyones[0][0], any(stops for _, stops in everyones)
            self.stops = stops
        if patience_s or late_s:
            self._start(0.0)
        if told == OUTDATED or (told == LOST and patience_s):
            raise PeerFailed("the members of this replica are about to change, or the host of the meetings is lost")
        if told == SILENT:
            raise UserError(
                f"replica {self.number} waits to be given the model, and no other has taken a step for {SILENT_S:g} s; "
                "start the job again."
            )
        self.over = told == OVER
        if told in (LOST, OVER):
            return None
        number, members, reports, common = told
        if self.number not in members:
            return None
        return Met(number, tuple(members), dict(zip(members, reports, strict=True)), common)

    def _start(self, patience_s: float) -> None:
        now = time.monotonic()
        self._come, self._end = now + self.timeout_s / 2 + patience_s, now + self.timeout_s + patience_s

    def failed(self, met: Met) -> bool:
        """Whether a member has found that it cannot go well (any rank; one question to the store)."""
        return self._store.check([f"{met.number}/failed"])

    def end(
        self, met: Met, *, well: bool, watch: Callable[[timedelta], Callable[[], bool]] | None = None
    ) -> bool:  # fmt: skip
        """Whether the meeting went well on every rank of every member; then, and only then, what was heard counts.

        `watch` begins to look whether a member is gone, for so long at most, on the first rank of a replica whose ranks
        all have heard all; what it gives says so.
        """
        [*votes] = gather_json(self._inside, well)
        end = lambda: self._end_of(met, all(votes), watch)  # noqa: E731
        [verdict, *_] = gather_json(self._inside, self._asked(end) if self._first else None)
        return verdict == "all"

    # -- the replica's first rank ------------------------------------------------------------------------------

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the store says; in an elastic job LOST where it says nothing any more, OUTDATED where it need not."""
        try:
            return ask()
        except _Outdated:
            return OUTDATED
        except (RuntimeError, OSError):
            if self._outdated is None:
                raise
            return LOST

    def _heard_of(self, k: int | str) -> Any:
        """What became of the meeting at which this replica has arrived, if it has."""
        return k if isinstance(k, str) else self._asked(partial(self._told, k))

    def _arrive(self, report: Any, common: Any, version: int, patience_s: float, late_s: float) -> int:
        """The number of the meeting at which this replica is ready."""
        store = self._store
        k = self._number()
        missed = self._last is not None and k > self._last + 1
        if self._failed is not None:
            self._expected |= self._alive(*self._failed)
        if missed or patience_s:
            self._expected |= {*self._known()}
        self._come += late_s if missed else 0.0
        if version >= 0 and not store.check([f"common/{version}"]):
            store.set(f"common/{version}", json.dumps(common))
        store.set(f"{k}/ready/{self.number}", json.dumps([version, report]))
        return k

    def _told(self, k: int) -> list[Any] | str | None:
        """Number, members, their reports and what they share; no members if it began without this replica, or is long
        over; None: it has not begun within a slice of time."""
        store, end = self._store, time.monotonic() + SLICE_S
        everybody = _All(sorted(self._expected - {self.number}), lambda r: self._ready(k, r) or self._gone(r))
        begun = lambda: store.check([f"{k}/in"]) or self._number() > k  # noqa: E731
        stops = lambda: self.stops or self._told_to_stop()  # noqa: E731
        try:
            self._wait(lambda: begun() or everybody() or stops(), min(self._come, end))
        except _Outdated:
            if self._taken_back(k) is not None:
                raise  # else this replica is in, and the others wait for it: its members may change after that
        if self._stands("over"):
            return OVER
        if not begun():
            if math.isinf(self._come) and self._silent():
                return SILENT
            if stops():
                return self._taken_back(k)
            if not everybody() and time.monotonic() < self._come:
                return None
            if self._decide(k):
                if self._number() >= k + KEPT:  # this process has slept, and the meeting was forgotten
                    store.delete_key(f"{k}/in")
                else:
                    self._forget(k - KEPT)
        store.compare_set("meetings", str(k) if k else "", str(k + 1))  # by all: who decided may be dead by now
        decided = self._read(f"{k}/in")
        _, members, common = [None, [], None] if decided is None else json.loads(decided)
        if self.number not in members:
            return [k, [], [], None]
        reports = [self._read(f"{k}/ready/{r}") for r in members]
        if any(told is None for told in reports):
            return [k, [], [], None]
        self._last = k
        return [k, members, [json.loads(told)[1] for told in reports if told is not None], common]

    def _silent(self) -> bool:
        """Whether no other replica has given a sign of life for SILENT_S."""
        since, before = self._signs
        others = [r for r in self._known() if r != self.number]
        now, signs = time.monotonic(), [self._number(), *(self._read(f"beat/{r}") for r in others)]
        if signs != before:
            self._signs = now, signs
        return signs == before and now - since > SILENT_S

    def _taken_back(self, k: int) -> list[Any] | None:
        """This replica's word that it is there, unless it is in by now."""
        said = self._read(f"{k}/ready/{self.number}")
        self._store.delete_key(f"{k}/ready/{self.number}")
        if said is None or (decided := self._read(f"{k}/in")) is None or self.number not in json.loads(decided)[1]:
            return [k, [], [], None]
        self._store.set(f"{k}/ready/{self.number}", said.decode())
        return None

    def _decide(self, k: int) -> bool:
        """Write who is in, unless another was first."""
        store = self._store
        told = {r: self._read(f"{k}/ready/{r}") for r in self._known()}
        there = {r: json.loads(said)[0] for r, said in sorted(told.items()) if said is not None and not self._gone(r)}
        newest = max(there.values(), default=-1)
        found = self._read(f"common/{newest}") if newest >= 0 else None
        mine = json.dumps([self.number, [*there], None if found is None else json.loads(found)])
        return store.compare_set(f"{k}/in", "", mine) == mine.encode()

    def _end_of(self, met: Met, well: bool, watch: Callable[[timedelta], Callable[[], bool]] | None) -> str:
        store, k, self._failed = self._store, met.number, None
        gone = watch(self.left) if well and watch is not None else lambda: False
        if not well:
            store.set(f"{k}/failed", "1")
        store.set(f"{k}/done/{self.number}", "1" if well else "0")

        others = [r for r in met.members if r != self.number]
        everybody = _All(others, lambda r: self._voted(k, r) or self._gone(r))
        with suppress(_Outdated):  # then the verdict is at once, and the same for all
            self._wait(lambda: not well or store.check([f"{k}/failed"]) or everybody() or gone(), self._end)
        votes = self._said(met)
        all_well = len(votes) == len(met.members) and b"0" not in votes.values()
        verdict = store.compare_set(f"{k}/verdict", "", "all" if all_well else "keep").decode()
        if verdict == "all":
            self._expected = set(met.members)
        else:  # who is alive says so within a moment: its own collective has failed too, or this tells it
            store.set(f"{k}/failed", "1")
            self._expected, self._failed = set(), (met, time.monotonic() + SLOW_S)
        return verdict

    def _alive(self, failed: Met, end: float) -> set[int]:
        """Who has voted in that meeting; steps have been taken since, so there is hardly anything to wait for."""
        everybody = _All(failed.members, lambda r: self._voted(failed.number, r) or self._gone(r))
        self._wait(everybody, end)
        return {*self._said(failed)}

    def _voted(self, k: int, replica: int) -> bool:
        return self._store.check([f"{k}/done/{replica}"])

    def _said(self, met: Met) -> dict[int, bytes]:
        """The votes that there are."""
        votes = {r: self._read(f"{met.number}/done/{r}") for r in met.members}
        return {r: vote for r, vote in votes.items() if vote is not None}

    def beat(self) -> None:
        """This replica takes steps (its first rank alone)."""
        if (now := time.monotonic()) - self._beat_s > BEAT_S:
            self._beat_s = now
            self._asked(lambda: self._store.add(f"beat/{self.number}", 1))

    def conclude(self) -> None:
        """The job has ended, and who comes from now on is too late (any of its ranks; no communication inside)."""
        self._asked(lambda: self._store.set("over", "1"))

    def leave(self) -> None:
        """This replica is broken, and nobody need wait for it (any of its ranks; no communication inside)."""

        def say() -> None:
            self._store.set(f"gone/{self.number}", "1")
            self._break_off()

        self._asked(say)

    def _break_off(self) -> None:
        """A meeting that this replica is in, and of which there is no verdict, fails: it says nothing more there."""
        number = self._number()
        for k in (number - 1, number):
            decided = self._read(f"{k}/in") if k >= 0 else None
            if decided is not None and self.number in json.loads(decided)[1] and self._read(f"{k}/verdict") is None:
                self._store.set(f"{k}/failed", "1")

    def vacate(self, replicas: Iterable[int]) -> None:
        """These have no members any more (the first rank alone)."""
        for replica in replicas:
            self._asked(partial(self._store.set, f"gone/{replica}", "1"))

    def join(self) -> None:
        """From now on this replica may be taken in, and is known by its number (its first rank alone)."""
        while (number := self._number()) < self._since:  # numbers go on where those of the store before ended
            self._store.compare_set("meetings", str(number) if number else "", str(self._since))
        self._store.delete_key(f"{self._number()}/ready/{self.number}")  # the word of a life that has ended
        self._break_off()
        self._store.delete_key(f"gone/{self.number}")
        while True:
            before = self._store.get("replicas") if self._store.check(["replicas"]) else b""
            known = {*json.loads(before or b"[]"), self.number}
            after = json.dumps(sorted(known))
            if self._store.compare_set("replicas", before.decode(), after) == after.encode():
                return

    def _number(self) -> int:
        return int(self._store.get("meetings")) if self._store.check(["meetings"]) else 0

    def _known(self) -> list[int]:
        return json.loads(self._store.get("replicas"))

    def _gone(self, replica: int) -> bool:
        return (self.lost is not None and self.lost(replica)) or self._stands(f"gone/{replica}")

    def _stands(self, key: str) -> bool:
        """Whether a replica has written it: a signed store raises for a stranger's word, but only where it is read."""
        return self._store.check([key]) and self._read(key) is not None

    def _ready(self, k: int, replica: int) -> bool:
        return self._store.check([f"{k}/ready/{replica}"])

    def _read(self, key: str) -> bytes | None:
        """What stands there, without waiting for it: `get` waits for a key that is not there, such as one of a meeting
        that is forgotten."""
        found = self._store.compare_set(key, NOTHING, NOTHING)
        return None if found == NOTHING.encode() else found

    def _wait(self, over: Callable[[], bool], end: float) -> None:
        begin = time.monotonic()
        while not over() and (now := time.monotonic()) < end:
            if self._outdated is not None and self._outdated():
                raise _Outdated
            time.sleep(min(max(LOOK_EVERY_S, (now - begin) / 20), SELDOM_S))

    def _forget(self, k: int) -> None:
        if k >= 0:
            for r in self._known():
                for what in ("ready", "done"):
                    self._store.delete_key(f"{k}/{what}/{r}")
            for key in (f"{k}/in", f"{k}/failed", f"{k}/verdict", f"common/{k}"):
                self._store.delete_key(key)


class _All:
    """Whether all of these have come, of what stays true: each look asks for the first that had not, so it costs one
    question however many they are."""

    def __init__(self, replicas: Iterable[int], come: Callable[[int], bool]) -> None:
        self._left, self._come = [*replicas][::-1], come

    def __call__(self) -> bool:
        while self._left and self._come(self._left[-1]):
            self._left.pop()
        return not self._left
