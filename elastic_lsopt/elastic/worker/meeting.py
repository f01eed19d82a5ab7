"""All ranks of a group meet in a store that anyone can reach, and agree on a key that nobody else has.

    rank r     met/<r>    its name and a challenge, random bytes, signed with the secret that the ranks share
    rank 0     session    all challenges, by rank, signed, once all are there
    rank r     believes a session that repeats its own challenge, and derives the group's key from it

A session that contains a rank's own fresh challenge cannot be a recording, whatever an older group with the same secret
has left, and values signed with the key cannot be used in another group. The group forms at once afterwards, because
all are there: nothing can interrupt that.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable

import torch.distributed as dist

from elastic_lsopt.backends.fabric.signed_store import SignedStore, derived
from elastic_lsopt.errors import PeerFailed

POLL_S = 0.002
CHALLENGE_BYTES = 16


def meet(
    store: dist.Store, rank: int, size: int, secret: bytes, *, look_up: Callable[[], None] = lambda: None
) -> SignedStore:
    """`store` signed with this group's own key, when all `size` ranks have come (collective).

    `store` is one that no other group has used; `look_up()` is called while this rank waits, and may raise to end it.
    Raises PeerFailed for a rank's word that is not signed with `secret`, or a session of another group.
    """
    signed, mine = SignedStore(store, derived(secret, "meeting")), secrets.token_hex(CHALLENGE_BYTES)
    signed.set(f"met/{rank}", mine)
    if rank == 0:
        for other in range(1, size):
            _wait(store, f"met/{other}", look_up)
        signed.set("session", json.dumps([mine, *(signed.get(f"met/{r}").decode() for r in range(1, size))]))
    _wait(store, "session", look_up)
    session = signed.get("session")
    challenges = json.loads(session)
    if len(challenges) != size or challenges[rank] != mine:
        raise PeerFailed("the group's session is of another group; a stranger played it back, or two jobs share it.")
    return SignedStore(store, derived(secret, "group", session))


def _wait(store: dist.Store, key: str, look_up: Callable[[], None]) -> None:
    while not store.check([key]):
        look_up()
        time.sleep(POLL_S)
