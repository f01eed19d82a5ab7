"""What is refused of a step, whoever takes it: methods and updates that do not go together, a step on moved weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_lsopt.errors import StaleWeights, UserError
from elastic_lsopt.optimizers.registry import methods
from elastic_lsopt.oracle.family import Family
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.owned import OwnedSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer


def refuse_while_moved(space: ParameterSpace, what: str) -> None:
    """Raise StaleWeights inside `averaged`, `perturbed` or `at`."""
    if space.copies.perturbations:
        raise StaleWeights(
            f"{what} where the weights are moved (averaged, perturbed, at), as the block's end would take it back; do "
            "so when the block has ended."
        )


def refuse_unstepped(parameters: Mapping[str, Tensor], base: torch.optim.Optimizer) -> None:
    """Raise UserError for a parameter that is to be trained and is not the base optimizer's: a method would move it and
    count its gradient, and nobody would step it."""
    held = {id(p) for group in base.param_groups for p in group["params"]}
    if strange := [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]:
        raise UserError(
            f"{strange[0]} is to be trained (requires_grad) and is in no param group of {type(base).__name__}, as are "
            f"{len(strange)} parameters in all; give it to the optimizer, or set its requires_grad to False."
        )


def refuse_halves(method: Method) -> None:
    """Raise UserError for a method whose halves of the ranks run the same micro-batches, where nobody deals them so."""
    if getattr(method, "halves", False):
        raise UserError(
            f"{type(method).__name__}(halves=True) deals each micro-batch to both halves of the ranks, which only "
            "lso.Engine and `elastic-lsopt train` do, in a job of fixed size; use one of these, or set halves=False."
        )


def refuse_mover(method: Method, update: UpdateOptimizer | None, *, steps_base: bool) -> None:
    """Raise UserError for a method that moves weights itself, before the base's step or after it, where that is not
    ours or not enough."""
    name, settles = methods.name_of(type(method)), hasattr(method, "settle")
    if settles and not steps_base:
        raise UserError(f"{name} moves weights when the base has stepped, and who holds the base here steps it later.")
    moves = hasattr(method, "move") and getattr(method, "decouple", True)
    if (settles or moves) and update is not None and update.points():
        raise UserError(
            f"{name} moves weights {'when the base has stepped' if settles else 'itself'}, and {update.points()[0]} "
            "keeps them in other places too; use another base, such as adamw"
            f"{', or set decouple=False' if hasattr(method, 'decouple') else ''}."
        )


def refuse_moved_matrices(before: Family, after: Family, world: int) -> None:
    """Raise UserError where an update keeps each matrix on one rank, and they would be dealt anew."""
    old, new = ([p.name for p in family.space.layout.parameters] for family in (before, after))
    owned = any(isinstance(v, Vector) and isinstance(v.space, OwnedSpace) for v in before.state_dict().values())
    if world > 1 and owned and old != new:
        raise UserError(
            f"{before.name} keeps what it remembers of a matrix on one of the {world} ranks, so its parameters may not "
            "be frozen, unfrozen or added on the way; save, and go on in a new job (lso.save, lso.load)."
        )
