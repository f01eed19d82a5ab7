"""Put a checkpoint into a training state of any layout: weights, base state, families, hyper-parameters, clock.

The saved chunks are read straight into the tensors that training goes on with. Base state that the target has not
made yet is made (a fresh Adam has none before its first step), also for a slot that is nothing but padding, because
its step counter must agree with the others'; state that the checkpoint does not have is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic_lsopt.backends.adapters.adversary import ADVERSARY, is_factor
from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.checkpoint.contents import (
    FORMAT,
    HOW_NOT_WHAT,
    READS,
    Held,
    Keys,
    TrainingState,
    metadata_for,
    persistent_buffers,
    random_states,
)
from elastic_lsopt.checkpoint.json_values import ELEMENTS, decode, number
from elastic_lsopt.checkpoint.safetensors_file import BY_NAME
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.layout import Piece
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of

log = logging.getLogger("elastic_lsopt")
Fill = Callable[[dict[str, Held]], None]


class Saved(Protocol):
    """What is known of a saved state before its tensors are read: a checkpoint on disk, or versions in memory."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Key -> dtype (and more): the tensors that can be read whole."""
        ...


@torch.no_grad()
def restore(state: TrainingState, saved: Saved, fill: Fill, *, hyperparameters: bool) -> None:
    """Make `state` what the checkpoint says (collective); `fill` reads the named chunks into the given tensors.

    Torch's random generators go on where they were if the number of ranks is the same. `hyperparameters` says whether
    the param groups' entries (learning rate, betas …) are taken too. Raises UserError, before anything has changed,
    for a checkpoint of another model or another number of param groups.
    """
    backend = state.backend
    keys, metadata = metadata_for(backend, saved.metadata)
    refuse_other_model(state, metadata, hyperparameters=hyperparameters)
    wanted: dict[str, Held] = {}
    for piece, master in zip(backend.layout.pieces, backend.masters, strict=True):
        _want(wanted, backend, f"{keys.weights}/{{}}", piece, master)
    if updates_of(backend.base) is not None:
        if metadata["base"]:
            log.warning("the checkpoint's base optimizer kept other state than an update does; the update begins anew.")
    elif backend.base is not None:
        _base(wanted, backend, saved, keys, metadata["base"])
    states = _families(wanted, state, keys, metadata)
    buffers = {
        key: (buffer, local(buffer).reshape(-1))
        for name, buffer in persistent_buffers(backend.module).items()
        if (key := f"{keys.buffers}/{name}") in saved.tensors
    }
    wanted |= {key: Held(flat.numel(), [(0, flat)]) for key, (_, flat) in buffers.items()}
    generators = random_states(backend) if metadata["world"] == backend.groups.job.size else {}
    generators = {key: g for key, g in generators.items() if key in saved.tensors}
    wanted |= {key: Held(g.numel(), [(0, g)]) for key, g in generators.items()}

    state.space.copies.mark_stale("a load that did not end")
    fill(wanted)
    for buffer, flat in buffers.values():  # a buffer that is not contiguous was read into a copy
        local(buffer).copy_(flat.view(local(buffer).shape))
    for key, generator in generators.items():
        if key.endswith("cpu"):
            torch.set_rng_state(generator)
        else:
            torch.cuda.set_rng_state(generator, backend.compute_device)
    if hyperparameters:
        for i, (group, kept) in enumerate(zip(backend.param_groups, metadata["groups"], strict=True)):
            if group.get("update") != kept.get("update"):
                log.warning(
                    "param group %d keeps its own hyper-parameters: the checkpoint's are those of %s.",
                    i, kept.get("update", "a torch optimizer"),
                )  # fmt: skip
                continue
            group.update({k: decode(v, backend.device) for k, v in kept.items() if k not in HOW_NOT_WHAT})
    for name, family in state.families.items():
        if name in states:
            family.load_state_dict(states[name])
    state.clock = replace(state.clock, samples=metadata["clock"]["samples"], steps=metadata["clock"]["steps"])
    if backend.separate_master and backend.layout.pieces:
        torch._foreach_copy_(list(backend.working), backend.masters)
    state.space.resync()
    for name, family in state.families.items():
        if name not in states:
            family.begin()


def refuse_other_model(state: TrainingState, metadata: dict[str, Any], *, hyperparameters: bool) -> None:
    """Raise UserError, in one line, for a checkpoint that does not fit."""
    if metadata["format"] not in READS:
        raise UserError(f"the checkpoint has format {metadata['format']}; this version reads formats 1 to {FORMAT}.")
    mine = {p.name: list(p.shape) for p in state.backend.layout.parameters}
    theirs = metadata["parameters"]
    if not any(is_factor(name, ADVERSARY) for name in mine):  # bi_lora's is no part of the model that it has trained
        theirs = {name: shape for name, shape in theirs.items() if not is_factor(name, ADVERSARY)}
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            here, there = mine.get(name, "absent"), theirs.get(name, "absent")
            raise UserError(
                f"the checkpoint is of another model: parameter {name} is {there} in it and {here} here "
                "(shapes of trainable parameters); give the model that it was saved from."
            )
    groups = len(state.backend.param_groups)
    if hyperparameters and groups != len(metadata["groups"]):
        raise UserError(
            f"the checkpoint has {len(metadata['groups'])} param groups, this optimizer {groups}; build the "
            "same groups, or resume with hyperparameters=False to keep those of this optimizer."
        )


def _want(wanted: dict[str, Held], backend: Backend, key: str, piece: Piece, target: Tensor) -> None:
    """Note that `target` is to be filled from `key`, whose {} stands for the parameter's name."""
    parameter = backend.layout.parameters[piece.parameter]
    held = wanted.setdefault(key.format(parameter.name), Held(parameter.numel))
    held.chunks.append((piece.offset, target))


def _base(wanted: dict[str, Held], backend: Backend, saved: Saved, keys: Keys, base: dict[str, dict[str, Any]]) -> None:
    """Make the base optimizer's state slot by slot, numbers at once, and note which tensors are to be filled."""
    anyones = max(base.values(), key=len, default={})
    for slot in range(len(backend.slot_keys)):
        pieces = [p for p in backend.layout.pieces if p.slot == slot]
        names = {p: backend.layout.parameters[p.parameter].name for p in pieces}
        state, key_tensor = backend.state_of(Piece(0, 0, 0, slot, 0))
        found = [base[n] for n in names.values() if n in base] if pieces else [anyones]
        slot_keys = {key: None for values in found for key in values}
        for gone in [k for k in state if k not in slot_keys]:
            del state[gone]
        for key in slot_keys:
            values = [v[key] for v in found if key in v]
            if all(v != ELEMENTS for v in values):
                state[key] = decode(_one_of(values, key, list(names.values())), backend.device)
                continue
            flat = _elements(state, key, key_tensor, _dtype(saved, keys, names.values(), key, key_tensor))
            for p in pieces:
                view = flat[p.start : p.start + p.length]
                value = base.get(names[p], {}).get(key)
                if value == ELEMENTS:
                    _want(wanted, backend, f"{keys.base}/{{}}/{key}", p, view)
                else:  # a parameter without dimensions keeps its moment as a number, one that never had a gradient none
                    view.fill_(number(value))


def _elements(state: dict[str, Any], key: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The slot's state `key` as a flat view, made of zeros where there is none."""
    have = state.get(key)
    if not isinstance(have, Tensor) or local(have).numel() != local(like).numel():
        state[key] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
    flat = local(state[key]).view(-1)
    return flat.zero_()


def _dtype(saved: Saved, keys: Keys, names: Any, key: str, like: Tensor) -> torch.dtype:
    """State in the weights' precision follows the weights here (bf16 to fp32); other state keeps its own."""
    for name in names:
        if (tensor := saved.tensors.get(f"{keys.base}/{name}/{key}")) is not None:
            same = tensor["dtype"] == saved.tensors[f"{keys.weights}/{name}"]["dtype"]
            return like.dtype if same else BY_NAME[tensor["dtype"]]
    return like.dtype


def _one_of(values: list[Any], key: str, names: list[str]) -> Any:
    """A slot of several parameters has one number for all of them."""
    if any(v != values[0] for v in values):
        log.warning(
            "the saved %r differs between %s … %s, which share one partition here; the largest is used.",
            key, names[0], names[-1],
        )  # fmt: skip
        return max(values, key=number)
    return values[0]


def _families(wanted: dict[str, Held], state: TrainingState, keys: Keys, metadata: dict[str, Any]) -> dict[str, State]:
    """What each family of this state goes on from, its Vectors noted to be filled; one not saved begins anew."""
    saved: dict[str, dict[str, Any]] = metadata.get("families") or {"method": metadata.get("method", {})}
    out: dict[str, State] = {}
    for name, family in state.families.items():
        mine, found = family.state_dict(), saved.get(name)
        if found is None:
            log.warning("the checkpoint holds no %s; it begins from the weights that were loaded.", name)
            continue
        here = [p.name for p in family.space.layout.parameters]
        there = set(metadata.get("of_parameters", {}).get(name, metadata["parameters"]))
        if new := [n for n in here if n not in there]:
            log.warning("the checkpoint's %s is not of %s and %d more: they begin anew.", name, new[0], len(new) - 1)
        for key in mine.keys() - found.keys():
            log.warning("the checkpoint has no state %r of %s (another method?); it starts anew.", key, name)
        out[name] = {key: decode(value, state.backend.device) for key, value in found.items() if value != ELEMENTS}
        for key in (key for key, value in found.items() if value == ELEMENTS):
            had = mine.get(key)
            vector = out[name][key] = had if isinstance(had, Vector) else family.empty(key)
            layout = vector.space.layout
            for piece, target in zip(layout.pieces, vector.tensors, strict=True):
                parameter = layout.parameters[piece.parameter]
                if parameter.name not in there:
                    continue
                held = wanted.setdefault(f"{keys.family(family)}/{key}/{parameter.name}", Held(parameter.numel))
                held.chunks.append((piece.offset, target))
    for name in saved.keys() - state.families.keys():
        log.warning("the checkpoint's %s is left aside: nothing here keeps it.", name)
    return out
