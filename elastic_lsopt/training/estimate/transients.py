"""What a rank takes for a while: in a pass over a micro-batch, and in the optimizer's step. Pure arithmetic.

Read from the sources of torch 2.13 and DeepSpeed 0.19.8, measured by benchmarks/plan_memory.py. With P parameters, B of
them in a block, R in no block (embeddings, head), N ranks, c bytes a weight in the forward and r = 4 a gradient in its
reduction (frozen weights are gathered as others are, and have no gradient):

    replicated    DDP keeps a bucket of 4 P. (The copies of an autocast are among the activations.)
    fsdp2         forward: R c + 2 B c, the gathered block and the buffer that it was gathered into.
                  backward: R c + 2 B c + B r, the block, the one before it on its way, the reduction of the one after;
                  and whole gradients, the block's own and those of R that are there. As a block ends its gradients B c
                  stand beside their reduction B r and the rank's share of it.
    ZeRO 1        backward: c x twice the bucket. Gradients stay whole until the last micro-batch has been.
    ZeRO 2        backward: c x bucket (twice with overlap_comm); once it has been full, its content once more, and the
                  rank's share of this micro-batch's gradients beside that of those before.
    ZeRO 3        a bucket is kept. Gathered: small parameters, what is needed again within max_reuse_distance, a
                  module and the prefetch, which arrive in a buffer and are copied. As the bucket is reduced, its
                  content once more.

    step          Adam on a CPU takes two tensors as large as what it steps on (a parameter; a flat partition under
                  ZeRO), on a GPU one as large as all; ZeRO 1 and 2 first copy their share of the gradient to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from elastic_lsopt.training.estimate.activations import Pass, Segment
from elastic_lsopt.training.estimate.placement import FP32, Placement
from elastic_lsopt.training.estimate.size import ModelSize

Parts = dict[str, int]
GATHERED, BUFFERS, ACTIVATIONS = "gathered weights", "buffers", "activations"
GRADIENT, UNREDUCED = "gradient", "gradients before their reduction"


def kept_buffers(size: ModelSize, at: Placement) -> int:
    """Bytes that a framework keeps from step to step for its communication."""
    if at.backend == "replicated":
        return FP32 * size.parameters if at.world > 1 else 0
    return at.compute * at.zero.reduce_bucket if at.backend == "deepspeed" and at.stage == 3 else 0


def in_pass(moments: Pass, size: ModelSize, at: Placement, *, microbatches: int) -> Parts:
    """Bytes at the worst moment of a pass, beyond what is kept from step to step; the gradient is among them.

    `microbatches` are those of this rank and pass: in the first the gradient is not there yet.
    """
    found = (part for segment in moments.segments for part in _moments(segment, moments, size, at, microbatches > 1))
    return max(found, key=lambda part: sum(part.values()))


def _moments(s: Segment, p: Pass, size: ModelSize, at: Placement, more: bool) -> Iterator[Parts]:
    """The worst moments of a segment; `more`: of a later micro-batch, with the gradients of those before."""
    if at.backend == "fsdp2":
        yield from _fsdp2(s, p, size, at, more)
        return
    new, backward, bucket = s.with_gradients - s.activations, s.kind == "backward", at.compute * at.zero.reduce_bucket
    share = at.compute * at.share(size.parameters)
    flushed = backward and (new >= bucket or s is p.segments[-1])
    match at.stage if at.backend == "deepspeed" else 0:
        case 3:
            gathered, arrives = _zero3_gathered(size, at, backward=backward)
            buffers = at.compute * arrives + flushed * min(bucket, new)
            yield {GATHERED: at.compute * gathered, BUFFERS: buffers, ACTIVATIONS: s.activations}
        case 2:
            buffers = bucket * (2 if at.zero.overlap else 1) * backward + flushed * min(bucket, new)
            held = 0 if at.optimizer_on_host else more + flushed
            yield {GRADIENT: share * held, BUFFERS: buffers, ACTIVATIONS: s.activations}
        case 1:
            whole = at.compute * size.parameters if more else new
            yield {GRADIENT: whole, BUFFERS: 2 * bucket * backward, ACTIVATIONS: s.activations}
        case _:
            yield {GRADIENT: at.working * size.parameters if more else new, ACTIVATIONS: s.activations}


def _fsdp2(s: Segment, p: Pass, size: ModelSize, at: Placement, more: bool) -> Iterator[Parts]:
    blocks, reshard = [at.in_forward(block) for block in size.blocks], at.reshard_after_forward
    trained, rest = [block.trained for block in size.blocks], at.in_forward(size.rest)
    arrives = 1 if at.shards > 1 else 0  # on one rank nothing is gathered into a buffer
    own = blocks[s.block] if s.block is not None else 0
    stay = 0 if reshard is True else sum(blocks) if reshard is False else sum(blocks) * int(reshard) // at.shards
    # What stays gathered for the backward is all there where the forward ends and the backward begins.
    gathered = rest + (stay if reshard is False else own + stay)
    if s.kind == "forward":
        buffer = own or max(blocks[-1:] or (rest,))
        gradient = FP32 * at.share(size.parameters) if more else 0
        yield {GATHERED: gathered, BUFFERS: arrives * buffer, GRADIENT: gradient, ACTIVATIONS: s.activations}
        return
    whole = s.with_own_gradients - s.activations
    reduced = (s.with_gradients - s.with_own_gradients) // at.compute
    gradient = FP32 * at.share(size.parameters if more else reduced)
    after = trained[s.block + 1] if s.block is not None and s.block + 1 < len(blocks) else 0
    coming = arrives * (blocks[s.block - 1] if s.block and reshard is not False else 0)
    yield {
        GATHERED: gathered, BUFFERS: coming + FP32 * after, GRADIENT: gradient, UNREDUCED: whole,
        ACTIVATIONS: s.activations,
    }  # fmt: skip
    if s.block is not None:  # it ends: its weights go, its gradients are reduced
        reducing = trained[s.block] + at.share(trained[s.block])
        yield {
            GATHERED: gathered - own, BUFFERS: coming + FP32 * reducing, GRADIENT: gradient, UNREDUCED: whole,
            ACTIVATIONS: s.left,
        }  # fmt: skip
    elif s is p.segments[-1]:  # what belongs to no block, likewise
        reducing = sum(trained[:1]) + size.rest.trained + at.share(size.rest.trained)
        yield {BUFFERS: FP32 * reducing, GRADIENT: gradient, UNREDUCED: whole, ACTIVATIONS: s.left}


def always_whole(size: ModelSize, at: Placement) -> int:
    """ZeRO 3: elements of the small parameters, which stay gathered between steps."""
    return sum(n for n in size.each if n <= at.zero.persistence)


def kept_for_backward(size: ModelSize, at: Placement) -> int:
    """ZeRO 3: elements, the small left out, that stay whole from the forward to the backward."""
    modules = _gathered_modules(size, at)
    # From a module's forward to its backward everything after it is used twice.
    after = (2 * used for used in accumulate(reversed(modules), initial=0))
    return sum(n for n, used in zip(reversed(modules), after, strict=False) if used < at.zero.reuse)


def _zero3_gathered(size: ModelSize, at: Placement, *, backward: bool) -> tuple[int, int]:
    """ZeRO 3: elements that are whole where most are, and those of the buffer in which further ones arrive."""
    if at.shards == 1:
        return 0, 0  # the shard is the parameter
    always, kept = always_whole(size, at), kept_for_backward(size, at)
    at_once = min(at.zero.live, max(_gathered_modules(size, at), default=0) + at.zero.prefetch)
    arrives = min(at_once, size.elements - always - (kept if backward else 0))
    return min(size.elements, always + kept + at_once), arrives


def _gathered_modules(size: ModelSize, at: Placement) -> list[int]:
    return [n for n in size.modules if n > at.zero.persistence]


def in_step(size: ModelSize, at: Placement, *, optim: str, gpu: bool) -> Parts:
    """Bytes that the optimizer takes while it steps, beyond what is kept; the gradient is among them."""
    share = at.share(size.parameters)
    adam = optim in ("adam", "adamw")
    flat = at.backend == "deepspeed" and at.stage > 0
    if gpu:
        temporary = share if adam else 0
    else:
        temporary = 2 * (share if flat else min(share, at.share(size.largest))) if adam else 0
    there = flat and at.optimizer_on_host  # the masters' gradient is kept, in fp32
    copied = share if flat and not there and (at.stage < 3 or at.bf16) else 0
    gradient = 0 if there or (flat and at.stage == 3) else at.working * share  # stage 3 keeps it
    return {GRADIENT: gradient, "gradient in fp32": FP32 * copied, "temporaries of the optimizer": FP32 * temporary}
