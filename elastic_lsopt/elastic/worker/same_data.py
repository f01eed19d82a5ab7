"""Whether all ranks hold the same data and the same base model: compared before the first step, and whenever somebody
joins.

A file on a node's own disk may be of another length, or of the same length and other content. Each rank would then draw
its own permutation and train on it, or put its own frozen weights under the adapters of all, and no loss would show it.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.data.draws import drawing_alone
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.errors import PeerFailed, UserError

Identity = Mapping[str, int | str | None]
"""Sizes and digests by name, as JSON; None: not known, and equal to everything."""
BASE = "base model's "
"""Before the names of files that belong to the model, not to the data."""
SAMPLED = 8
"""Samples of a user's own data set that are read, twice, for its digest."""


def digest_of(*arrays: NDArray[Any]) -> str:
    """64 bits of the arrays' types, shapes and bytes; about 1 GB/s."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        _add(digest, array)
    return digest.hexdigest()


def identity_of(dataset: Any) -> Identity:
    """Of a data set by number: its length, and a digest of a few samples spread over it. Of a stream: its shards.

    The digest is None where samples are of a kind that has no bytes, or are others when they are read again.
    """
    if isinstance(dataset, ShardStream):
        return {"shards": len(dataset.shards), "digest of the shards' names": dataset.digest()}
    indices = sorted({round(i * (len(dataset) - 1) / max(SAMPLED - 1, 1)) for i in range(SAMPLED)})
    first, again = (_sampled(dataset, indices) for _ in range(2))
    return {"samples": len(dataset), "digest of samples": first if first == again else None}


def _sampled(dataset: Any, indices: Sequence[int]) -> str | None:
    digest = hashlib.blake2b(digest_size=8)
    try:
        with drawing_alone(0) as draws:
            for i in indices:
                draws.start("identity", i)
                _add(digest, dataset[i])
    except _NoBytes:
        return None
    return digest.hexdigest()


class _NoBytes(Exception):
    """A value that cannot be told from another by its bytes."""


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, bytes | str | int | float | complex | None):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif hasattr(value, "__array_interface__") and not (array := np.asarray(value)).dtype.hasobject:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    else:
        raise _NoBytes


def difference(everyones: Sequence[Identity], reference: int = 0, nodes: Sequence[str] = ()) -> tuple[list[int], str]:
    """The ranks whose data or model is not that of rank `reference`, and one line that says so; ([], "") for none.

    `nodes` are the ranks' nodes, named where there are several.
    """
    theirs = everyones[reference]
    odd: dict[int, str] = {}
    for rank, own in enumerate(everyones):
        for what in (w for w in {**theirs, **own} if None not in (theirs.get(w, ""), own.get(w, ""))):
            if theirs.get(what) != own.get(what) and rank not in odd:
                here, there = own.get(what, "missing"), theirs.get(what, "missing")
                odd[rank] = f"{what}: {here} there, {there} on rank {reference}"
    if not odd:
        return [], ""

    def named(rank: int) -> str:
        return f"{rank} on {nodes[rank]}" if len(set(nodes)) > 1 else str(rank)

    first = next(iter(odd.values()))
    whose = "base model" if first.startswith(BASE) else "training data"
    ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(map(named, odd))}"
    return [*odd], (
        f"the {whose} of {ranks} is not that of rank {named(reference)} ({first.removeprefix(BASE)}); give every node "
        "the same files."
    )


def refuse_other_data(group: dist.ProcessGroup, own: Identity) -> None:
    """Compare all ranks' data (collective, a gloo group). Raises UserError on all of them where it is not the same."""
    everyones, nodes = zip(*gather_json(group, [dict(own), socket.gethostname()]), strict=True)
    _, said = difference(everyones, nodes=nodes)
    if said:
        raise UserError(said)


class SameData:
    """The comparison in an elastic job, for one process through all its generations."""

    def __init__(self) -> None:
        self._agreed, self._own = False, {}

    def learn(self, own: Callable[[], Identity]) -> Identity:
        """This process's data, asked for once: a change of members reads no sample."""
        self._own = self._own or dict(own())
        return self._own

    def check(self, group: dist.ProcessGroup, own: Callable[[], Identity], nodes: Sequence[str] = ()) -> None:
        """Compare all ranks' data (collective, a gloo group) with that of who has trained already, else of rank 0.

        Raises UserError on the ranks whose data is not the job's, PeerFailed on the others, who go on without them; a
        job that nobody has begun does not begin: UserError on all.
        """
        everyones = gather_json(group, [self._agreed, self.learn(own)])
        reference = next((rank for rank, (agreed, _) in enumerate(everyones) if agreed), None)
        odd, said = difference([identity for _, identity in everyones], reference or 0, nodes)
        if said:
            raise UserError(said) if reference is None or group.rank() in odd else PeerFailed(said)
        self._agreed = True
