"""What must hold before a product with the curvature means anything; six to ten gradients, once an oracle.

1. the loss is a mean                    it stays as it is when every sample is given twice
2. the gradient is deterministic         two of them agree
3. the skeleton is the model             its gradient is the engine's
4. autograd sees the second derivative   H g agrees with a central difference along g: a custom kernel's backward
                                         may be a constant to autograd, and the product silently wrong

[Note: an engine in bf16] Products are taken in fp32 whatever the engine computes in, and near a minimum, where the
gradients of the samples cancel, a bf16 gradient may be further from the fp32 one than it is long. So what 2 and 3 allow
is measured: the skeleton's gradient is taken once more in bf16, and its distance from the one in fp32 is what this type
does to this model here. The last check never meets bf16: it compares the skeleton with itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elastic_lsopt.errors import PeerFailed, Unsupported, UserError
from elastic_lsopt.oracle.curvature.products import Mode, Products
from elastic_lsopt.oracle.losses.loss import samples
from elastic_lsopt.space.vector import BorrowedGradient, Vector

log = logging.getLogger("elastic_lsopt")
AGREE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""How far two gradients may be from each other, as a share of their length: the order of sums differs."""
ROUNDINGS = 3.0
"""… and for a narrower type, how many times what its rounding does to the skeleton's gradient."""
STEP = {torch.float64: 1e-8, torch.float32: 3e-3}
"""Of |w|: the length of the central difference."""
CONFIRMED, SAME, KINKS = 0.02, {torch.float64: 0.01, torch.float32: 0.05}, 5.0
"""Shares of the difference's length: its half must be as near for it to count; a product as far from it, or KINKS times
as far as its half is, is another one (a single kink between the two lengths moves it twice as far).
"""


def check_products(products: Products, gradient: Callable[[], BorrowedGradient]) -> None:
    """Raise UserError, naming the check and by how much it failed; `gradient` is the engine's (collective).

    Where only the last check fails and the mode is `auto`, products go on by differences, with a warning; asked for by
    name, an exact mode raises Unsupported.
    """
    space = products.space
    _refuse_a_sum(products)
    first = gradient().clone()
    length = space.norm(first)
    bare = products.gradient()
    limit, apart = _limit(products, bare, length), _apart(bare, first, length)
    del bare
    if not apart <= limit:
        twice = _apart(gradient(), first, length)
        if not twice <= limit:
            raise UserError(
                f"the gradient is not deterministic: two passes over the same batch at the same weights differ by "
                f"{twice:.1e} of its length (limit {limit:.0e}); take the randomness out of the model or the loss, or "
                "draw it from torch's generator, which is replayed."
            )
        raise UserError(
            f"the gradient through the bare module differs from the engine's by {apart:.1e} of its length (limit "
            f"{limit:.0e}): hooks or a wrapper change what the model computes; remove them while curvature is measured."
        )
    if products.chosen != "differences" and length > 0:
        reason = _second_derivative_missing(products, first, length)
        if reason and products.mode != "auto":
            raise Unsupported(f"products={products.mode!r} needs a second derivative, but {reason}; use 'differences'.")
        if reason:
            log.warning("products with the curvature go by central differences, because %s.", reason)
            products.use_differences()


def _limit(products: Products, bare: Vector, length: float) -> float:
    """See [Note: an engine in bf16]; `bare` is the skeleton's gradient in the products' precision."""
    space, narrow = products.space, products.space.shards.compute_dtype
    if narrow in AGREE:
        return AGREE[narrow]
    mode: Mode = "blockwise" if products.chosen == "blockwise" else "rebuilt"
    rounded = Products(space, products.backend, products.loss, products.slots, mode, narrow)
    try:
        share = _apart(rounded.gradient(), bare, length)
    except (torch.OutOfMemoryError, PeerFailed):
        raise
    except RuntimeError:  # a model that mixes precisions by itself
        share = torch.finfo(narrow).eps ** 0.5
    finally:
        rounded.close()
    return max(AGREE[torch.float32], ROUNDINGS * share)


def _apart(a: Vector, b: Vector, length: float) -> float:
    distance = b.space.norm(a - b)
    return distance / length if length else distance


def _second_derivative_missing(products: Products, g: Vector, length: float) -> str | None:
    """Why exact products cannot be had, in half a sentence; None where they can, or where nothing speaks against it.

    In fp64, where a difference can be so short that it crosses none of a ReLU network's kinks and yet be no noise (in
    fp32 where a kernel knows no other); on each rank's first micro-batch. A difference that its half does not confirm
    says nothing.
    """
    u = g * (1 / length)
    try:
        products.hvp(u)
    except (torch.OutOfMemoryError, PeerFailed):
        raise
    except RuntimeError as error:  # what autograd and kernels raise where a formula is missing
        return f"autograd cannot differentiate the model twice ({' '.join(str(error).split())[:160]})"
    products.close()  # its graph may have taken most of the memory
    for dtype in (torch.float64, torch.float32):
        try:
            return _off_the_difference(products, u, dtype)
        except (torch.OutOfMemoryError, PeerFailed):
            raise
        except RuntimeError:  # a kernel that knows no fp64
            continue
    return None


def _off_the_difference(products: Products, u: Vector, dtype: torch.dtype) -> str | None:
    space = products.space
    mode: Mode = "blockwise" if products.chosen == "blockwise" else "rebuilt"
    wide = Products(space, products.backend, products.loss, products.slots[:1], mode, dtype)
    h = STEP[dtype] * max(space.norm(space.weights), 1.0)
    try:
        exact, near, nearer = wide.hvp(u), wide.difference(u, h), wide.difference(u, h / 2)
    finally:
        wide.close()
    size, doubt, off = space.norm(nearer), space.norm(near - nearer), space.norm(nearer - exact)
    if not size > 0 or not doubt <= CONFIRMED * size or not isfinite(off):
        return None
    if off <= max(SAME[dtype] * size, KINKS * doubt):
        return None
    return (
        f"the product along the gradient is {off / size:.1e} of its length away from a central difference: some "
        "backward pass is a constant to autograd"
    )


def _refuse_a_sum(products: Products) -> None:
    once = products.values(lambda batch: batch)
    try:
        twice = products.values(_doubled)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):  # tensors that belong to no sample singly
        return
    if once and twice / once > 1.7:
        raise UserError(
            f"the loss is not a mean: it grows from {once:.4g} to {twice:.4g} when every sample is given twice; divide "
            "it by the number of samples, or give lso.Loss(forward, criterion, count)."
        )


def _doubled(batch: object) -> object:
    n = samples(batch)
    return tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() and len(t) == n else t, batch)
