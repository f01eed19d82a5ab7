"""Signed records: what agents tell each other, and what they refuse from strangers.

A record is JSON with an HMAC-SHA256 under the job's secret over its bytes, and the time at which it was signed. The
store that carries it asks nobody who he is, so a reader believes nothing that this check has not passed.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from elastic_lsopt.errors import UserError

MAX_SKEW_S = 300.0
"""Oldest record that is believed, and the largest difference of two nodes' clocks: a recorded message cannot be
played back later than this."""
SECRET_VARIABLE = "ELASTIC_LSOPT_SECRET"
MIN_SECRET_BYTES = 16


class Refused(ValueError):
    """A record that is not believed; the message says why, in one line."""


def sign(body: dict[str, Any], secret: bytes, *, now: float | None = None) -> bytes:
    """The record of `body`, signed now."""
    told = json.dumps({"at": time.time() if now is None else now, "body": body}, separators=(",", ":"))
    return seal(told.encode(), secret)


def verified(record: bytes, secret: bytes, *, now: float | None = None, any_age: bool = False) -> dict[str, Any]:
    """The body of a record. Raises Refused for a wrong secret, bytes that are no record, and a clock that is off."""
    told = unseal(record, secret)
    try:
        content = json.loads(told)
        at, body = float(content["at"]), content["body"]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"a signed record cannot be read: {error}.") from None
    if not any_age:
        refuse_skew(at, now)
    if not isinstance(body, dict):
        raise Refused("a signed record holds no object.")
    return body


def seal(text: bytes, secret: bytes) -> bytes:
    """The text behind its MAC."""
    return hmac.digest(secret, text, "sha256").hex().encode() + b" " + text


def unseal(sealed: bytes, secret: bytes) -> bytes:
    """The text of `seal`. Raises Refused where another secret, or none, has signed it."""
    mac, _, text = sealed.partition(b" ")
    if not hmac.compare_digest(mac, hmac.digest(secret, text, "sha256").hex().encode()):
        raise Refused(
            f"a record is not signed with this job's secret; give every node the same secret_file or {SECRET_VARIABLE}."
        )
    return text


def refuse_skew(at: float, now: float | None = None) -> None:
    """Raise Refused where a record was signed more than MAX_SKEW_S from now."""
    skew = at - (time.time() if now is None else now)
    if not abs(skew) <= MAX_SKEW_S:
        raise Refused(
            f"a record is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this node's clock, the limit is "
            f"{MAX_SKEW_S:.0f} s; set the clocks of both nodes (NTP)."
        )


def job_secret(secret_file: str | None, run_folder: Path) -> bytes:
    """The job's secret: of the environment, of `secret_file`, else of the run folder, where the first node makes it.

    Raises UserError for a file that cannot be read and a secret that is too short.
    """
    if given := os.environ.get(SECRET_VARIABLE):
        return _long_enough(given.encode(), SECRET_VARIABLE)
    path = Path(secret_file) if secret_file else run_folder / "elastic" / "secret"
    if secret_file is None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"secret-{os.getpid()}-{secrets.token_hex(4)}")
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(32))
        try:
            os.link(draft, path)  # the first node's counts, whole or not at all
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    try:
        return _long_enough(path.read_bytes().strip(), f"secret_file={path}")
    except OSError as error:
        raise UserError(f"secret_file={path} cannot be read: {error.strerror}; give a readable file.") from None


def _long_enough(secret: bytes, name: str) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise UserError(f"{name} holds {len(secret)} bytes; a secret needs at least {MIN_SECRET_BYTES}.")
    return secret
