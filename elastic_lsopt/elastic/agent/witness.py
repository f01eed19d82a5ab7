"""The witness: one signed key in etcd, changed by compare-and-set, which breaks the tie of an even split.

etcd's own JSON gateway (`/v3/kv/…`) is spoken directly: a get and a transaction are all that is needed.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from elastic_lsopt.elastic.mail.signing import Refused, sign, verified
from elastic_lsopt.elastic.membership.quorum import Ask, WitnessVote
from elastic_lsopt.errors import UserError

TIMEOUT_S = 2.0
TRIES = 5


class Witness:
    """`ask` is what `record.AskWitness` wants done. Blocks for TIMEOUT_S a request: call it from a thread."""

    def __init__(self, address: str, job: str, secret: bytes) -> None:
        parts = urlsplit(address)
        if parts.scheme != "etcd" or not parts.hostname or not parts.port:
            raise UserError(f"elastic.witness={address} must read etcd://host:port.")
        self._url = f"http://{parts.hostname}:{parts.port}/v3/kv"
        self._key, self._secret = _text(f"elastic_lsopt/{job}/witness".encode()), secret

    def ask(self, number: int, ask: Ask) -> WitnessVote:
        """The witness's vote after `ask`. Raises OSError where etcd does not answer, or others always come first."""
        for _ in range(TRIES):
            found = self._call("range", {"key": self._key}).get("kvs", [])
            stored = self._read(found[0]) if found else None
            vote = WitnessVote.answer(stored, number, ask)
            if vote == stored:
                return vote
            # The revision at which the key was last written; 0 where there is none.
            unchanged = {"key": self._key, "target": "MOD", "mod_revision": found[0]["mod_revision"] if found else "0"}
            value = _text(sign(vote.to_json(), self._secret))
            put = {"request_put": {"key": self._key, "value": value}}
            if self._call("txn", {"compare": [unchanged], "success": [put]}).get("succeeded"):
                return vote
        raise OSError("another agent changed the witness's key each time")

    def _read(self, found: dict[str, Any]) -> WitnessVote | None:
        try:
            # A vote counts however old it is: its time is not looked at.
            return WitnessVote.from_json(verified(base64.b64decode(found["value"]), self._secret, any_age=True))
        except Refused as error:
            raise OSError(f"the witness's key is not this job's: {error}") from None

    def _call(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self._url}/{what}", json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except (urllib.error.URLError, ValueError) as error:
            raise OSError(f"etcd at {self._url}: {error}") from None


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
