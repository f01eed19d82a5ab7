"""What the replicas of a job say of themselves, in the host's store, so that each knows what it is among the others.

    found/<r>      {"since": 9, "held": true}   the generation that formed it, and whether its workers held a state
    began/<r>      9                            it has made a step there by a state that counts
    finished/<r>   1                            it has made its last step, and is through
    job, data      the job's id and what all train on: the word of the first

[Note: founder or newcomer] A replica whose workers hold no state must know whether the job has one. It waits until
every other replica that has workers has said what it has found. If one held a state, or has begun although it found
none because it was there before, this one is a newcomer, which is given the model when it meets the others. If none
has, all of them found the job: they go on from their checkpoints, or from the beginning.

[Note: a store of its own for each host] The store dies with its host. What a replica has said it says again to the next
one; what it has not said there, nobody believes it to have said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_lsopt.backends.fabric.signed_store import SignedStore, derived
from elastic_lsopt.elastic.mail.mailbox import connect
from elastic_lsopt.elastic.worker.link import Entered
from elastic_lsopt.elastic.worker.same_data import Identity, difference
from elastic_lsopt.errors import UserError

LOOK_EVERY_S = 0.01
Present = Callable[[], Entered]
"""The newest generation; raises where this replica need not go on waiting."""


class Roll:
    """One rank's line to that store; of a replica's ranks the first one speaks. Raises RuntimeError or OSError, here
    and in all methods, where the store does not answer."""

    def __init__(self, entered: Entered, timeout: timedelta) -> None:
        self._own, self._timeout = entered.replica, timeout
        self._said: dict[str, str] = {}
        self._connect(entered)

    def _connect(self, entered: Entered) -> None:
        self._store_since = entered.store_since
        client, secret = connect(entered.store, self._timeout), bytes.fromhex(entered.meetings)
        self._store = SignedStore(dist.PrefixStore(f"roll/{self._store_since}", client), derived(secret, "roll"))
        self.meetings: dist.Store = SignedStore(
            dist.PrefixStore(f"meetings/{self._store_since}", client), derived(secret, "meetings")
        )
        """Where the replicas meet: another key of the same store."""

    def follow(self, entered: Entered) -> bool:
        """Whether the host's store is another one in this generation, to which all that was said is said again."""
        if entered.store_since == self._store_since:
            with suppress(RuntimeError, OSError):  # the host's agent has started again, with an empty store
                self._store.check(["job"])
                return False
        self._connect(entered)
        for key, value in self._said.items():
            self._store.set(key, value)
        return True

    def _say(self, key: str, value: Any) -> None:
        self._said[key] = json.dumps(value)
        self._store.set(key, self._said[key])

    def _first_word(self, key: str, value: Any) -> Any:
        """What stands there for all: the word of who came first."""
        self._said[key] = self._store.compare_set(key, "", json.dumps(value)).decode()
        return json.loads(self._said[key])

    def _heard(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    # -- at the beginning --------------------------------------------------------------------------------------

    def found(self, since: int, *, held: bool, job: str) -> None:
        """Generation `since` formed this replica, whose workers held a state, or none; `job` is its id, if known."""
        if job:
            self._first_word("job", job)
        self._say(f"found/{self._own}", {"since": since, "held": held})

    def is_newcomer(self, since: int, present: Present) -> bool:
        """Of a replica that has found no state. See [Note: founder or newcomer]."""
        while True:
            others = self._others(present())
            found = {k: self._heard(f"found/{k}") for k in others}
            if all(told is not None and told["since"] == others[k] for k, told in found.items()):
                return any(told["held"] or (at < since and self._began(k, at))
                           for (k, at), told in zip(others.items(), found.values(), strict=True))  # fmt: skip
            time.sleep(LOOK_EVERY_S)

    def job(self, anew: str) -> str:
        """The job's id: `anew` where nobody has one."""
        return self._first_word("job", anew)

    def refuse_other_data(self, own: Identity) -> None:
        """Raises UserError where this replica's data is not that of the first one."""
        theirs: Mapping[str, Any] = self._first_word("data", dict(own))
        odd, said = difference([theirs, own])
        if odd:
            raise UserError(said.replace("rank 1", f"replica {self._own}", 1).replace("rank 0", "the job's others", 1))

    # -- later -------------------------------------------------------------------------------------------------

    def began(self, since: int) -> None:
        """The first step is made."""
        self._say(f"began/{self._own}", since)

    def finish(self) -> None:
        """The last one is made, and whatever had to be made of the state."""
        self._say(f"finished/{self._own}", 1)

    def unfinished(self, entered: Entered) -> list[int]:
        """The other replicas whose end must be waited for: they train, or are on their way back to it."""
        return [k for k, since in self._others(entered).items() if not self._heard(f"finished/{k}")
                and self._counts(k, since)]  # fmt: skip

    def _counts(self, k: int, since: int) -> bool:
        found = self._heard(f"found/{k}")
        return found is None or found["since"] != since or found["held"] or self._began(k, since)

    def _began(self, k: int, since: int) -> bool:
        return self._heard(f"began/{k}") == since

    def _others(self, entered: Entered) -> dict[int, int]:
        """The other replicas that have workers, and which generation formed each."""
        return {k: entered.replicas[k].since for k in entered.living if k != self._own}
