"""Records: what is believed, what is refused, and that the refusal says why."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from elastic_lsopt.elastic.mail.signing import MAX_SKEW_S, Refused, job_secret, sign, verified
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast
SECRET = b"sixteen bytes ok"


def test_a_record_comes_back() -> None:
    assert verified(sign({"a": [1, "ä"]}, SECRET), SECRET) == {"a": [1, "ä"]}


def test_the_mac_is_hmac_sha256_of_the_text() -> None:
    mac, _, text = sign({"a": 1}, SECRET, now=5.0).partition(b" ")
    assert mac.decode() == hmac.new(SECRET, text, hashlib.sha256).hexdigest()


def test_another_secret_a_changed_byte_and_noise_are_refused() -> None:
    good = sign({"a": 1}, SECRET)
    for bad in (sign({"a": 1}, b"another secret.."), good[:-1] + b"!", b"", b"xyz", os.urandom(99)):
        with pytest.raises(Refused, match="not signed with this job's secret"):
            verified(bad, SECRET)


@pytest.mark.parametrize(("skew", "word"), [(MAX_SKEW_S + 1, "ahead of"), (-MAX_SKEW_S - 1, "behind")])
def test_a_clock_that_is_off_is_named(skew: float, word: str) -> None:
    record = sign({"a": 1}, SECRET, now=1000.0 + skew)
    with pytest.raises(Refused, match=f"301 s {word} this node's clock, the limit is 300 s"):
        verified(record, SECRET, now=1000.0)
    assert verified(sign({}, SECRET, now=1000.0 + skew * 0.99), SECRET, now=1000.0) == {}
    assert verified(record, SECRET, now=1000.0, any_age=True) == {"a": 1}


def test_the_first_node_makes_the_secret_and_the_others_find_it(tmp_path: Path) -> None:
    first = job_secret(None, tmp_path)
    assert len(first) == 64 and job_secret(None, tmp_path) == first
    assert (tmp_path / "elastic" / "secret").stat().st_mode & 0o077 == 0


def test_a_secret_that_cannot_be_read_or_is_short_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"secret_file=.*cannot be read: No such file"):
        job_secret(str(tmp_path / "none"), tmp_path)
    (tmp_path / "short").write_text("abc")
    with pytest.raises(UserError, match="holds 3 bytes; a secret needs at least 16"):
        job_secret(str(tmp_path / "short"), tmp_path)
