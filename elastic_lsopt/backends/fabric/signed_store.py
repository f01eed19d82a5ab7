"""A store whose values are believed only with the group's signature: for groups that form where anyone can write.

torch's TCPStore asks nobody who he is: whoever reaches its port can give another rank's address for a group that is
being formed, and every rank connects to whatever stands there. Behind this wrapper a value that was not written with
the key, or was written under another name, is refused.

[Note: what a stranger can still do] He cannot be believed, but he can be in the way: overwrite or delete a value, so
that a group does not form; and read, because values are signed and not hidden. Gloo's and NCCL's own connections carry
no signature: see docs/security.md.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from elastic_lsopt.errors import PeerFailed

MAC_BYTES = hashlib.sha256().digest_size


def derived(secret: bytes, *parts: str | bytes) -> bytes:
    """A key for one purpose: HMAC-SHA256 of the parts, each with its length, under `secret`; 32 bytes."""
    told = [part.encode() if isinstance(part, str) else part for part in parts]
    return hmac.digest(secret, b"".join(len(part).to_bytes(8, "big") + part for part in told), "sha256")


class SignedStore(dist.Store):
    """`inner` with HMAC-SHA256 over key and value, under `key` (see `derived`). 32 bytes and microseconds per value.

    Signatures are the same for the same value, so compare-and-set works as ever. Reading a value without the right
    signature raises PeerFailed. Counters of `add` are signed too, by compare-and-set, so they are for a few ranks.
    """

    def __init__(self, inner: dist.Store, key: bytes) -> None:
        super().__init__()
        self.inner, self._key = inner, key

    def clone(self) -> SignedStore:
        return SignedStore(self.inner.clone(), self._key)  # type: ignore[attr-defined]

    def set(self, key: str, value: str | bytes) -> None:
        self.inner.set(key, self._signed(key, value))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._verified(key, self.inner.get(key))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected = self._signed(key, expected_value) if expected_value else b""
        found = self.inner.compare_set(key, expected, self._signed(key, desired_value))  # type: ignore[arg-type]
        return self._verified(key, found) if found else b""

    def add(self, key: str, value: int) -> int:
        while True:
            before = self.get(key) if self.inner.check([key]) else b""
            if not value:
                return int(before or b"0")
            after = str(int(before or b"0") + value).encode()
            if self.compare_set(key, before, after) == after:
                return int(after)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        self.inner.wait(list(keys), *([] if timeout is None else [timeout]))

    def check(self, keys: Sequence[str]) -> bool:  # type: ignore[override]
        return self.inner.check(list(keys))

    def delete_key(self, key: str) -> bool:
        return self.inner.delete_key(key)

    deleteKey = delete_key  # how torch's PrefixStore calls it  # noqa: N815

    def num_keys(self) -> int:
        return self.inner.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self.inner.set_timeout(timeout)

    def _signed(self, key: str, value: str | bytes) -> bytes:
        value = value.encode() if isinstance(value, str) else bytes(value)
        return derived(self._key, key, value) + value

    def _verified(self, key: str, found: bytes) -> bytes:
        mac, value = found[:MAC_BYTES], found[MAC_BYTES:]
        if not hmac.compare_digest(mac, derived(self._key, key, value)):
            raise PeerFailed(f"the store's value of {key} is not signed with this job's secret; a stranger wrote it.")
        return value


def server_of(store: dist.Store) -> dist.Store:
    """The store at the bottom of prefixes and signatures."""
    while True:
        if isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        elif isinstance(store, SignedStore):
            store = store.inner
        else:
            return store
