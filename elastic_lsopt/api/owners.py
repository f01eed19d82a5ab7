"""The modules that hold a loop's parameters, found in the process: a torch optimizer is given tensors alone.

Batch norm's statistics belong to a step as the weights do, and the type of a forward shows in modules only.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elastic_lsopt.errors import UserError


@dataclass(frozen=True)
class Owners:
    """`home` is the module whose names the parameters have (None where no module holds any); `roots` the outermost."""

    home: nn.Module | None
    roots: tuple[nn.Module, ...]


def owners_of(parameters: Mapping[str, Tensor], model: nn.Module | None = None) -> Owners:
    """Who holds these parameters: `model` if it is given, else found among Python's objects.

    Cost: one look at every object of the process. Modules that `gc.freeze` hides are not found. Raises UserError where
    `model` does not hold one of them.
    """
    if model is not None:
        held = {id(p) for p in model.parameters()}
        for name, p in parameters.items():
            if id(p) not in held:
                raise UserError(
                    f"model={type(model).__name__} does not hold parameter {name} of the base optimizer; give the one "
                    "that does, or leave model out."
                )
        return Owners(unwrapped(model), (model,))
    wanted = {id(p) for p in parameters.values()}
    holders = {m: held for m in _every_module() if (held := wanted & {id(p) for p in m.parameters()})}
    inner = {child for m in holders for child in m.modules() if child is not m}
    roots = tuple(m for m in holders if m not in inner)
    # Of several roots the first parameter's comes first, in whatever order they were found.
    order = {id(p): i for i, p in enumerate(parameters.values())}
    roots = tuple(sorted(roots, key=lambda m: min(order[i] for i in holders[m])))
    every = set().union(*holders.values())
    named = {n: p for n, p in parameters.items() if id(p) in every}
    homes = [m for m, held in holders.items() if held == every and _names(m, named)]
    if homes:
        return Owners(min(homes, key=lambda m: sum(1 for _ in m.modules())), roots)
    bodies = [unwrapped(m) for m in roots]
    return Owners(bodies[0] if len(bodies) == 1 else nn.ModuleList(bodies) if bodies else None, roots)


def refuse_not_averaged(named: Iterable[tuple[str, Tensor]], owners: Owners, *, changed: bool) -> None:
    """Raise UserError for a parameter that was frozen when DistributedDataParallel was built around its model.

    Where none was unfrozen their number tells; else (`changed`) DDP is asked for its buckets. Memory, only then: one
    gradient.
    """
    wrappers = [m for root in owners.roots for m in root.modules() if isinstance(m, DistributedDataParallel)]
    trained = {id(p) for ddp in wrappers for p in ddp._module_parameters if p.requires_grad}
    counted = sum(ddp._get_ddp_logging_data()["num_parameter_tensors"] for ddp in wrappers)
    if len(trained) <= counted and not changed:
        return
    buckets = [bucket for ddp in wrappers for bucket in ddp.reducer._get_zeros_like_grad_buckets()]
    averaged = {id(p) for bucket in buckets for p in bucket.parameters()}
    for name, p in named:
        if id(p) in trained - averaged:
            raise UserError(
                f"parameter {name} was frozen when DistributedDataParallel was built, which does not average its "
                "gradient, so the ranks would drift apart; build DistributedDataParallel again after unfreezing."
            )


def unwrapped(module: nn.Module) -> nn.Module:
    """Without DistributedDataParallel and torch.compile around it, which lengthen names."""
    compiled = module._modules.get("_orig_mod")
    inner = module.module if isinstance(module, DistributedDataParallel) else compiled
    return unwrapped(inner) if inner is not None else module


def _every_module() -> list[nn.Module]:
    objects = gc.get_objects()
    # By type first: one look at each of a million objects, none of which may have a say (lazy proxies load on it).
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.Module)}
    return [o for o in objects if type(o) in kinds and "_parameters" in vars(o)]


def _names(module: nn.Module, named: Mapping[str, Tensor]) -> bool:
    own = dict(module.named_parameters(remove_duplicate=False))
    return all(own.get(name) is p for name, p in named.items())
