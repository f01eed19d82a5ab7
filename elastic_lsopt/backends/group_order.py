"""In which order the ranks of an FSDP2 job come to their collectives: each must come to them in the same one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


class GroupOrder:
    """In which order forwards have used the groups of parameters that FSDP2 gathers and reduces together.

    Ranks meet in the collectives of their groups one after the other, and FSDP2 does not look whether they are of the
    same group. It keeps the order itself, and clears it after a backward: this listens to its list.
    """

    def __init__(self, modules: Iterable[FSDPModule]) -> None:
        self._numbers: dict[int, int] = {}
        self._said: list[int] = []
        for module in modules:
            state: Any = module._get_fsdp_state()  # private: torch 2.11 to 2.13
            if (group := state._fsdp_param_group) is not None:
                self._numbers[id(group)] = len(self._numbers)
            self._listen(state._comm_ctx)

    def _listen(self, context: Any) -> None:
        if hasattr(context, "post_forward_order"):
            context.post_forward_order = _Noted(self._note, context.post_forward_order)
            return
        make = context.lazy_init  # which the first forward calls, of the root's

        def then_listen(device: torch.device) -> None:
            make(device)
            self._listen(context)

        context.lazy_init = then_listen

    def taken(self) -> bytes:
        """The numbers of the groups since the last call, in the order of their use."""
        out = array("I", self._said).tobytes()
        self._said.clear()
        return out

    def _note(self, group: Any) -> None:
        self._said.append(self._numbers.get(id(group), len(self._numbers)))


class _Noted(list[Any]):
    """A list that says what is appended to it."""

    def __init__(self, note: Callable[[Any], None], begin: Iterable[Any]) -> None:
        super().__init__(begin)
        self._note = note

    def append(self, group: Any) -> None:
        self._note(group)
        super().append(group)
