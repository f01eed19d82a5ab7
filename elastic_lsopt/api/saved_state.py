"""State families as plain containers and back, each number and piece by the name of its parameter.

    "families"      {family: {key: this rank's pieces of a Vector, or a number}}
    "layouts"       {family: {"": how the family's Vectors lay, key: another Vector's own}}

What is loaded may train other parameters than what was saved: block-wise training, gradual unfreezing. A parameter of
which nothing was saved begins anew, and what was saved of one that is not trained here is left aside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.family import Family
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.step_report import log
from elastic_lsopt.space.layout import Layout, plain_name
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import FAMILY

Chunk = tuple[str, int, int]
"""A piece as any rank knows it: parameter, offset, length."""


@dataclass(frozen=True)
class Laid:
    """How a Vector lay: the shapes of its parameters, which all ranks know, and this rank's pieces."""

    shapes: Mapping[str, tuple[int, ...]]
    chunks: Sequence[Chunk]

    @staticmethod
    def of(layout: Layout) -> Laid:
        names = [p.name for p in layout.parameters]
        return Laid(
            {p.name: tuple(p.shape) for p in layout.parameters},
            [(names[piece.parameter], piece.offset, piece.length) for piece in layout.pieces],
        )


def saved(families: Mapping[str, Family]) -> dict[str, Any]:
    """Copies of all families, with the names that `load` goes by."""
    made: dict[int, dict[str, Any]] = {}

    def plain(layout: Layout) -> dict[str, Any]:  # one object for all Vectors that lie alike, which a file holds once
        laid = Laid.of(layout)
        return made.setdefault(id(layout), {"parameters": dict(laid.shapes), "pieces": list(laid.chunks)})

    values: dict[str, dict[str, Any]] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for name, family in families.items():
        values[name], layouts[name] = {}, {"": plain(family.space.layout)}
        for key, value in family.state_dict().items():
            values[name][key] = [t.clone() for t in value.tensors] if isinstance(value, Vector) else value
            if isinstance(value, Vector) and value.space.layout is not family.space.layout:
                layouts[name][key] = plain(value.space.layout)
    return {"families": values, "layouts": layouts}


def load(families: Mapping[str, Family], state_dict: Mapping[str, Any], known: Collection[str]) -> None:
    """Go on from what `saved` gave. `known` are the names of all parameters, trained or not.

    Raises UserError where no saved name is among them, for a parameter of another shape, for pieces that this rank
    does not hold, and for an earlier state without names whose tensors are not as many and as long as those here.
    """
    values: Mapping[str, Any] = state_dict.get("families", {"method": state_dict.get("method", {})})
    layouts = {
        name: {key: Laid(laid["parameters"], [tuple(chunk) for chunk in laid["pieces"]]) for key, laid in own.items()}
        for name, own in state_dict.get("layouts", {}).items()
    }
    there = dict.fromkeys(n for own in layouts.values() for laid in own.values() for n in laid.shapes)
    here = dict.fromkeys(p.name for family in families.values() for p in family.space.layout.parameters)
    if there and there.keys().isdisjoint({*known, *here}):
        raise UserError(
            f"the saved state is of {_some(there)}, and no parameter here has such a name (here: {_some(here)}); give "
            "the optimizer the same named parameters."
        )
    if there and (new := [n for n in here if n not in there]):
        log.warning("the saved state is not of %s: they begin anew.", _some(new))
    if gone := [n for n in there if n not in here]:
        log.warning("what was saved of %s is left aside: they are not trained here.", _some(gone))
    for name, own in values.items():
        if name not in families:
            log.warning("the saved state of %s is left aside: nothing here keeps it.", name)
            continue
        go_on(families[name], own, layouts.get(name) or _by_place(families[name], own))


def go_on(family: Family, values: Mapping[str, Any], layouts: Mapping[str, Laid]) -> None:
    """Load lists of pieces and numbers that lay so; a parameter without a counterpart is as the family began."""
    here, there = {p.name for p in family.space.layout.parameters}, set(layouts[""].shapes)
    if here.isdisjoint(there):
        return  # its numbers tell of those that it had
    fresh, state = family.state_dict(), State()
    for key, value in values.items():
        if not isinstance(value, list):
            if key.partition("/")[2] not in there - here:  # a number of a parameter that is gone ends as its Vectors do
                state[key] = value
            continue
        laid, had = layouts.get(key, layouts[""]), fresh.get(key)
        if isinstance(had, Vector) or not here.isdisjoint(laid.shapes):
            vector = state[key] = had if isinstance(had, Vector) else family.empty(key)
            _fill(vector, value, laid, family.name)
    family.load_state_dict(state)


def _fill(vector: Vector, values: Sequence[Tensor], laid: Laid, family: str) -> None:
    kept = dict(zip(laid.chunks, values, strict=True))
    mine = Laid.of(vector.space.layout)
    for chunk, tensor in zip(mine.chunks, vector.tensors, strict=True):
        name, offset, length = chunk
        if name not in laid.shapes:
            continue
        if tuple(laid.shapes[name]) != mine.shapes[name]:
            raise UserError(
                f"{family}: parameter {name} was saved with shape {tuple(laid.shapes[name])} and has "
                f"{mine.shapes[name]} here; build the same model, or leave the optimizer's state out."
            )
        if chunk not in kept:
            raise UserError(
                f"{family}: elements {offset} to {offset + length} of parameter {name} are another rank's in the saved "
                "state, which is one rank's part; load it on as many ranks, sharded alike, or save by lso.save."
            )
        tensor.copy_(kept[chunk])


def _by_place(family: Family, values: Mapping[str, Any]) -> dict[str, Laid]:
    """How an earlier state without names lay: as the Vectors do here, where it has as many pieces, and as long ones."""
    out = {"": Laid.of(family.space.layout)}
    for key, tensors in values.items():
        if not isinstance(tensors, list):
            continue
        had = family.state_dict().get(key)
        out[key] = Laid.of(had.space.layout) if isinstance(had, Vector) else out[""]
        if [t.numel() for t in tensors] != [length for _, _, length in out[key].chunks]:
            raise UserError(
                f"the state of {family.name} was saved without names of parameters: {key} has {len(tensors)} tensors "
                f"there, and here {len(out[key].chunks)} or others; train the same parameters as then."
            )
    return out


def renamed(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What `saved` gave, under other names of parameters."""

    def new(laid: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "parameters": {names.get(n, n): shape for n, shape in laid["parameters"].items()},
            "pieces": [(names.get(n, n), offset, length) for n, offset, length in laid["pieces"]],
        }

    families = dict(state_dict.get("families", {}))
    for name in (name for name in families if name.startswith(FAMILY)):
        parts = {key: key.partition("/") for key in families[name]}
        families[name] = {
            f"{parts[key][0]}/{names[parts[key][2]]}" if parts[key][2] in names else key: value
            for key, value in families[name].items()
        }
    out = {**state_dict, "families": families}
    if "layouts" in state_dict:
        layouts = state_dict["layouts"].items()
        out["layouts"] = {name: {key: new(laid) for key, laid in own.items()} for name, own in layouts}
    return out


def refuse_other_names(saved: Sequence[str], here: Sequence[str]) -> None:
    """Raise UserError where torch, which goes by place, would give one parameter's state to another.

    A name may have more in front on one side, as in a wrapper around the model.
    """
    for place, (old, new) in enumerate(zip(map(plain_name, saved), map(plain_name, here), strict=False)):
        if old != new and not old.endswith(f".{new}") and not new.endswith(f".{old}"):
            raise UserError(
                f"place {place} was saved with parameter {old} and has {new} here, and torch loads by place: give the "
                "optimizer the same parameters in the same order (those that are not trained may be frozen), or, to go "
                "by place all the same, give it parameters without names."
            )


def _some(names: Collection[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first
