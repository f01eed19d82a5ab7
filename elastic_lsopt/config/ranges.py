"""The ranges that settings share, and the error of a value that cannot stand."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from elastic_lsopt.errors import UserError

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Name = Annotated[str, Field(min_length=1, strict=True)]
IMPORT_PATH = r"^[\w.]+:\w+$"
ImportPath = Annotated[str, Field(pattern=IMPORT_PATH, strict=True)]

SETTINGS = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
BLOCK = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Of a block inside another: not strict, else pydantic takes no mapping for it. The fields' own types are."""


class SettingError(UserError):
    """A value that cannot stand; `key` is the dotted YAML key, by which a reader finds the line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
