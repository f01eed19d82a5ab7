"""What ranks tell each other, and how they fail together: JSON in tensors over a named group, never a pickle.

(torch's `all_gather_object` and its kin unpickle what arrives, and whoever gets bytes into a group runs code in every
rank with them.)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.errors import PeerFailed, UserError

T = TypeVar("T")


def gather_json(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Every rank's `value` (JSON), in the group's order, on every rank (collective, two gathers; a gloo group).

    None is the group of one process. Raises TypeError where `value` is not JSON, before any communication.
    """
    text = json.dumps(value, separators=(",", ":")).encode()
    if group is None:
        return [json.loads(text)]
    own = zlib.compress(text, 1)
    sizes = [int(size) for size in _gather(group, torch.tensor([len(own)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    texts = _gather(group, padded)
    return [json.loads(zlib.decompress(t[:n].numpy().tobytes())) for t, n in zip(texts, sizes, strict=True)]


def _gather(group: dist.ProcessGroup, own: Tensor) -> list[Tensor]:
    out = [torch.empty_like(own) for _ in range(group.size())]
    group.allgather([out], [own]).wait()
    return out


def together(group: dist.ProcessGroup | None, act: Callable[[], T]) -> T:
    """`act()` on all ranks (collective); where it raises on one, all raise.

    The rank itself raises what it met; the others raise UserError where that was one, else PeerFailed, "rank R: …".
    """
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = raised
    said = gather_json(group, None if error is None else [isinstance(error, UserError), one_line(error)])
    if error is not None:
        raise error
    for rank, other in enumerate(said):
        if other is not None:
            users, line = other
            raise (UserError if users else PeerFailed)(f"rank {rank}: {line}")
    return result  # type: ignore[return-value]


def one_line(error: BaseException) -> str:
    """An error without its traceback, at most 300 characters but for a file's name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
