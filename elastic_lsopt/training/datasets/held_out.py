"""Which documents are held out: by a hash of the name, whole, so each stays in its part when others join or leave."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.config.settings import SettingError


def place_of(name: str) -> float:
    """A document's name as a number in [0, 1); those below eval_fraction are held out."""
    return int.from_bytes(blake2b(name.encode(), digest_size=6).digest()) / 2**48


def held_out(names: list[str], fraction: float) -> NDArray[np.bool_]:
    """Which documents are kept from training: those whose place is below `fraction`.

    Where chance would leave a part without any document, the one with the nearest place goes there.
    Raises SettingError where there is only one document to divide.
    """
    division = Division(fraction)
    out = np.array([division.takes(name) for name in names], bool)
    if (other := division.exception()) is not None:
        out[names.index(other)] ^= True
    return out


class Division:
    """The same for documents that come one after the other: `takes` each, and at the end ask for the `exception`.

    `exception` (of an earlier reading of the same documents) is a name that goes to the other part.
    """

    def __init__(self, fraction: float, exception: str | None = None) -> None:
        self.fraction, self._other = fraction, exception
        self._lowest: tuple[float, str] = (1.0, "")
        self._highest: tuple[float, str] = (-1.0, "")
        self._only: str | None = None
        self._several = False

    def takes(self, name: str) -> bool:
        """Whether the document of that name is held out."""
        if not self.fraction:
            return False
        place = place_of(name)
        self._lowest, self._highest = min(self._lowest, (place, name)), max(self._highest, (place, name))
        self._several |= self._only is not None and self._only != name
        self._only = name
        return (place < self.fraction) != (name == self._other)

    def exception(self) -> str | None:
        """The document that must change its part, because one part would have none; None where both have some.

        Raises SettingError where there is only one document to divide.
        """
        if not self.fraction or self._other is not None:
            return None
        if not self._several:
            raise SettingError(
                "eval_fraction",
                f"eval_fraction={self.fraction} of a dataset with one document leaves nothing to hold out or to train "
                "on; give at least 2 documents, or set eval_fraction: 0.",
            )
        if self._lowest[0] >= self.fraction:
            return self._lowest[1]
        return self._highest[1] if self._highest[0] < self.fraction else None
