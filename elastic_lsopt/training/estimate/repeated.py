"""A pass of many equal blocks from the pass of a few: what one block more adds is the same each time.

    forward   0 1 | 1' 1' 1' | 2 3          what comes after has the copies' saved tensors beside its own
    backward  3 2 | 1' 1' 1' | 1 0          and the gradients of the copies that are done

126 blocks take as long as four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from elastic_lsopt.training.estimate.activations import Pass, Segment

FEW = 4
"""Blocks that are run: the first and the last are at the ends, and two between them show what one adds."""
AGAIN = 1
"""The block that stands for those that are left out."""


@contextmanager
def few_of(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[Sequence[nn.Module]]:
    """The model with FEW of its blocks, where it has more and they are alike; else as it is. The rest comes back."""
    home = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == list(blocks)), None)
    if home is None or len(blocks) <= FEW + 1 or len({_form(block) for block in blocks}) > 1:
        yield blocks
        return
    left_out = list(blocks[FEW:])
    del home[FEW:]
    try:
        yield list(home)
    finally:
        home.extend(left_out)


def with_more_blocks(few: Pass, more: int, block_gradient: int) -> Pass:
    """The pass with `more` further blocks like block AGAIN, whose gradient takes `block_gradient` bytes.

    `few` is of FEW blocks.
    """
    if not more:
        return few
    saved = _last(few, "forward", AGAIN + 1).left - _last(few, "forward", AGAIN).left
    segments, within = list[Segment](), False
    for forward in (s for s in few.segments if s.kind == "forward"):
        if forward.block == AGAIN + 1 and not within:
            within = True
            own = _own(few, "forward")
            segments += [_moved(s, j * saved, 0, s.block and s.block + j) for j in range(1, more + 1) for s in own]
        segments.append(_moved(forward, within * more * saved, 0, _shifted(forward, more)))
    done = False
    for backward in (s for s in few.segments if s.kind == "backward"):
        if backward.block == AGAIN and not done:
            done = True
            own = _own(few, "backward")
            segments += [
                _moved(s, j * saved, (more - j) * block_gradient, s.block and s.block + j)
                for j in range(more, 0, -1)
                for s in own
            ]
        segments.append(
            _moved(backward, 0 if done else more * saved, done * more * block_gradient, _shifted(backward, more))
        )
    return Pass(tuple(segments), few.saved + more * saved)


def _form(block: nn.Module) -> Any:
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())


def _last(few: Pass, kind: str, block: int) -> Segment:
    return [s for s in few.segments if (s.kind, s.block) == (kind, block)][-1]


def _own(few: Pass, kind: str) -> list[Segment]:
    return [s for s in few.segments if (s.kind, s.block) == (kind, AGAIN)]


def _shifted(s: Segment, more: int) -> int | None:
    return s.block + more if s.block is not None and s.block > AGAIN else s.block


def _moved(s: Segment, activations: int, gradients: int, block: int | None) -> Segment:
    return replace(
        s,
        block=block,
        activations=s.activations + activations,
        with_own_gradients=s.with_own_gradients + activations,
        with_gradients=s.with_gradients + activations + gradients,
        left=s.left + activations,
    )
