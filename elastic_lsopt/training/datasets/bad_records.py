"""Records that cannot be used: counted, the first ten named by file and line, and a limit that stops the job."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_lsopt.config.settings import SettingError

NAMED = 10


class BadRecords:
    """`add` each; beyond `limit` that raises SettingError. `count` and the words of the first ten stay."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.first: list[str] = []
        self._key = ""

    def add(self, error: SettingError) -> None:
        """Count a record that is left out. Raises SettingError where it is one too many; with limit 0, `error`."""
        self.count += 1
        self._key = self._key or error.key
        if len(self.first) < NAMED:
            self.first.append(str(error))
        if not self.limit:
            raise error
        self.refuse(self.count, self.first)

    def refuse(self, count: int, first: Sequence[str]) -> None:
        """Raise SettingError where `count` bad records are more than the limit."""
        if count > self.limit:
            raise SettingError(
                self._key or "max_bad_records",
                f"{bad_records(count, first)} That is more than max_bad_records={self.limit}; mend the data, or raise "
                "the limit.",
            )


def bad_records(count: int, first: Sequence[str]) -> str:
    """How many records are bad, and the first ten, in one line."""
    named = " ".join(first)
    more = f" (and {count - len(first)} more)" if count > len(first) else ""
    return f"{count} bad record{'s' * (count > 1)}: {named}{more}"
