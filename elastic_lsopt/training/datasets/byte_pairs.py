"""H(next byte | byte): the best loss that a model of pairs of bytes can reach; a language model must end below it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FLUSH_BYTES = 1 << 17


class BytePairs:
    """Pairs of bytes, counted within each text that is added; 1 MiB of counts, and 4 while it counts."""

    def __init__(self) -> None:
        self._pairs = np.zeros(256 * 256, np.int64)
        self._texts: list[bytes] = []
        self._waiting = self.bytes = 0

    def add(self, text: bytes) -> None:
        """Count a text."""
        self._texts.append(text)
        self._waiting += len(text)
        self.bytes += len(text)
        if self._waiting >= FLUSH_BYTES:
            self._flush()

    def entropy(self) -> float:
        """In nats a byte; nan without a pair."""
        self._flush()
        table = self._pairs.reshape(256, 256)
        seen = table > 0
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        return float(-(table[seen] * np.log(share[seen])).sum() / table.sum()) if seen.any() else float("nan")

    def _flush(self) -> None:
        codes = np.frombuffer(b"".join(self._texts), np.uint8).astype(np.int64)
        pairs = 256 * codes[:-1] + codes[1:]
        within = np.ones(len(pairs), bool)
        ends = np.cumsum([len(text) for text in self._texts])[:-1]
        within[ends[(ends > 0) & (ends < len(codes))] - 1] = False
        self._pairs += np.bincount(pairs[within], minlength=256 * 256)
        self._texts, self._waiting = [], 0


def bigram_entropy(texts: Iterable[bytes]) -> float:
    """H(next byte | byte) of these texts in nats a byte, pairs counted within each text; nan without a pair."""
    pairs = BytePairs()
    for text in texts:
        pairs.add(text)
    return pairs.entropy()
