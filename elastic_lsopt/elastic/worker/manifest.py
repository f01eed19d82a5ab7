"""One manifest a step: a generation claims a checkpoint's name at the job's store before it is given."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from elastic_lsopt.backends.fabric.signed_store import SignedStore, derived
from elastic_lsopt.elastic.mail.mailbox import connect

TIMEOUT = timedelta(seconds=5)


def claim(store_address: str, secret: bytes, generation: int, step: int, replica: int = 0) -> bool:
    """Whether the replica's checkpoint of `step` is this generation's to commit: by compare-and-set, against older
    ones.

    False where a newer generation has claimed it, where the store cannot be asked, and where what stands there is not
    signed with `secret`. The caller holds a lease.
    """
    with suppress(RuntimeError, OSError):
        key = f"manifest/{step}" if not replica else f"manifest/replica/{replica}/{step}"
        store = SignedStore(connect(store_address, TIMEOUT), derived(secret, "manifests"))
        before = store.get(key).decode() if store.check([key]) else ""
        if not before or int(before) <= generation:
            return store.compare_set(key, before, str(generation)) == str(generation).encode()
    return False
