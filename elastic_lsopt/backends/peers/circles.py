"""The groups of peers that a rank has, each made when its members first meet and kept for as long as it is of use.

[Note: whose group is still good] Two members may not agree whether a group still stands: one has dropped it after a
failure that another has not seen, because it came too late. So each tells at every meeting which it has and when it was
made; one that they do not all name alike is made anew. So each may let go of one too: of those with a member that is
not there, and of those that were of no use for IDLE meetings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from elastic_lsopt.backends.peers.intervals import Seat, bundles
from elastic_lsopt.backends.peers.meeting import Met
from elastic_lsopt.backends.peers.peers import Peers

IDLE = 64
"""Meetings after which a group that none has used ends."""


class Circles:
    """Of the rank at `own`; `store` is the job's."""

    def __init__(self, own: Seat, store: dist.Store) -> None:
        self._own, self._store = own, store
        self._known: dict[str, tuple[int, Peers]] = {}
        self._used: dict[str, int] = {}
        """The newest meeting in which each was."""
        self._sent_bytes = 0

    @property
    def told(self) -> dict[str, int]:
        """What the others must know: in which meeting each was made."""
        return {name: number for name, (number, _) in self._known.items()}

    @property
    def sent_bytes(self) -> int:
        """By this rank, in all."""
        return self._sent_bytes + sum(peers.sent_bytes for _, peers in self._known.values())

    def only(self, met: Met) -> None:
        """Let go of those that are of no use any more: so they are bounded, however many have come and gone."""
        for name, (_, peers) in [*self._known.items()]:
            if not {*peers.members} <= {*met.members} or self._used[name] < met.number - IDLE:
                self._drop(name)

    def of(
        self, members: Sequence[int], met: Met, left: timedelta, over: Callable[[], bool],
        chosen: Sequence[int] | None = None,
    ) -> Peers:  # fmt: skip
        """The circle of these members of a meeting, for the parameters of these numbers (None: all) (collective).

        `over` says that the meeting has failed. Raises PeerFailed where one is gone.
        """
        name = "-".join(map(str, members)) + ("" if chosen is None else f" of {min(chosen)}")
        made = {met.reports[m]["circles"].get(name) for m in members}
        number, _ = self._known.get(name, (None, None))
        if number != met.number and (len(made) > 1 or number is None):
            self._drop(name)
            store = dist.PrefixStore(f"circle/{met.number}/{name}", self._store)
            cuts = cuts_of(met.reports, members, chosen)
            self._known[name] = met.number, Peers(self._own, members, bundles(self._own, cuts, members), store, left)
        self._used[name] = met.number
        _, peers = self._known[name]
        peers.limit(left, over)
        return peers

    def drop(self) -> None:
        """An exchange has failed: none of them is used again."""
        for name in [*self._known]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self._known:
            _, peers = self._known.pop(name)
            self._sent_bytes += peers.sent_bytes
            self._used.pop(name, None)
            peers.close()


def cuts_of(
    reports: Mapping[int, Mapping], members: Sequence[int], chosen: Sequence[int] | None = None
) -> dict[Seat, list[tuple[int, int, int]]]:  # fmt: skip
    """What each rank of the members holds of the chosen parameters, as they have told it, in these parameters' order.

    A piece is known by its parameter's number among the chosen.
    """
    number = None if chosen is None else {parameter: i for i, parameter in enumerate(chosen)}
    return {
        (member, rank): [
            (parameter if number is None else number[parameter], offset, length)
            for parameter, offset, length in cut
            if number is None or parameter in number
        ]
        for member in members
        for rank, cut in enumerate(reports[member]["cut"])
    }
