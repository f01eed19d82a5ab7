"""Text to token ids: the bytes themselves, or a Hugging Face tokenizer.

bytes        ids 0 … 255 are the byte values, 256 ends a document (and pads a classifier's texts)
tokenizer    AutoTokenizer.from_pretrained(folder); its own end and padding tokens
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.building.hub import local_only

END_OF_DOCUMENT = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokens(Protocol):
    """A vocabulary: `size` ids in numbers of type `dtype`, of which `start` begins a prompt, `end` closes a document
    and `padding` fills a row (None: it has none). `fingerprint` tells it from every other.
    """

    size: int
    dtype: Any
    start: int | None
    end: int | None
    padding: int | None

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: bytes) -> NDArray[Any]:
        """The ids of a piece of running text, [n], without special tokens."""
        ...

    def encode_whole(self, text: bytes, limit: int) -> NDArray[Any]:
        """The ids of one text to classify, with the model's special tokens, cut to `limit`."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of these ids."""
        ...


class ByteTokens:
    """256 byte values and the end of a document: a vocabulary of 257 that needs no file and fits any text."""

    size = 257
    dtype: Any = np.uint16
    start: int | None = None
    end: int | None = END_OF_DOCUMENT
    padding: int | None = END_OF_DOCUMENT
    fingerprint = "bytes"

    def encode(self, text: bytes) -> NDArray[np.uint16]:
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_whole(self, text: bytes, limit: int) -> NDArray[np.uint16]:
        return self.encode(text[:limit])

    def decode(self, ids: Any) -> str:
        """The text; ends of documents vanish, broken UTF-8 becomes the replacement character."""
        return bytes(int(i) for i in ids if int(i) < END_OF_DOCUMENT).decode("utf-8", errors="replace")


class FolderTokens:
    """A Hugging Face tokenizer. Text that is not UTF-8 is read with replacement characters.

    Raises SettingError where the folder or name gives no tokenizer.
    """

    def __init__(self, name_or_path: str, key: str = "tokenizer_name_or_path") -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(Path(name_or_path).expanduser()),
                local_files_only=local_only(key, name_or_path),
            )
        except SettingError:
            raise
        except Exception as error:  # many kinds, by what is missing or broken in the folder
            raise SettingError(
                key,
                f"no tokenizer in {name_or_path!r} ({_first_line(error)}); give a folder that "
                "AutoTokenizer reads, or leave tokenizer_name_or_path out for byte-level tokens.",
            ) from None
        self.size = len(self.tokenizer)
        self.end: int | None = self.tokenizer.eos_token_id
        padding = self.tokenizer.pad_token_id
        self.padding: int | None = self.end if padding is None else padding
        self.dtype: Any = np.uint16 if self.size <= 2**16 else np.int32
        begin = self.tokenizer.bos_token_id
        self._fingerprint: str | None = None
        self.start: int | None = begin if begin is not None and self._special[:1] == [begin] else None

    @property
    def _special(self) -> list[int]:
        """What the tokenizer puts around a text of its own accord."""
        return self.tokenizer("", verbose=False)["input_ids"]

    @property
    def fingerprint(self) -> str:
        """Of all that decides which ids a text or a conversation gets; made when it is asked for first."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            rules: Any = tokenizer.backend_tokenizer.to_str()
        else:
            rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]
        special = [self.size, self.start, self.end, self.padding, self._special, tokenizer.special_tokens_map]
        told = json.dumps([rules, special, tokenizer.chat_template], default=repr, sort_keys=True)
        return blake2b(told.encode(), digest_size=16).hexdigest()

    def encode(self, text: bytes) -> NDArray[Any]:
        return self._ids(text, add_special_tokens=False)

    def encode_whole(self, text: bytes, limit: int) -> NDArray[Any]:
        return self._ids(text, truncation=True, max_length=limit)

    def _ids(self, text: bytes, **how: Any) -> NDArray[Any]:
        ids = self.tokenizer(text.decode("utf-8", errors="replace"), verbose=False, **how)["input_ids"]
        return np.asarray(ids, dtype=self.dtype)

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def tokens_of(config: TrainConfig) -> Tokens:
    """The tokenizer that is named, else the one in the model's own folder, else bytes."""
    if config.tokenizer_name_or_path is not None:
        return FolderTokens(config.tokenizer_name_or_path)
    if config.model_name_or_path is None:
        return ByteTokens()
    folder = Path(config.model_name_or_path).expanduser()
    has_one = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return (
        FolderTokens(config.model_name_or_path, "model_name_or_path")
        if has_one or not folder.is_dir()
        else ByteTokens()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
