"""What a checkpoint holds: everything that training goes on from, by parameter name and offset.

    weights/<parameter>              the master weights
    base/<parameter>/<key>           the base optimizer's state, any key that is element by element
    <family>/<vector>/<parameter>    a state family's Vectors: the method's, a mean of the weights … (oracle/family.py)
    buffers/<name>                   the module's persistent buffers, rank 0's
    rng/<rank>/cpu, rng/<rank>/gpu   the state of torch's random generators

With several replicas `weights@1`, `base@1` … are replica 1's, but for a family that is the same on all of them. Each is
a flat tensor, written as the chunks that the ranks hold. Numbers (`step`, lr, betas, the clock, the user's own
JSON) are `facts`. Frozen parameters are not saved: they come with the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elastic_lsopt.backends.backend import Backend, local
from elastic_lsopt.checkpoint.json_values import ELEMENTS, encode
from elastic_lsopt.errors import StaleWeights, Unsupported, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.family import Family
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Parameter, Piece, plain_name
from elastic_lsopt.space.owned import OwnedSpace
from elastic_lsopt.space.vector import Vector

FORMAT = 2
READS = (1, 2)
"""Formats that a resume takes: the first held one family, the method's."""
HOW_NOT_WHAT = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a param group that say on what machine a step is computed, not what it computes: not saved."""


class TrainingState(Protocol):
    """What is saved and restored; an `Engine` is one. `clock` is set and `families` are filled by a resume."""

    @property
    def backend(self) -> Backend: ...
    @property
    def space(self) -> ParameterSpace: ...
    @property
    def families(self) -> Mapping[str, Family]: ...

    @property
    def clock(self) -> SampleClock: ...
    @clock.setter
    def clock(self, clock: SampleClock) -> None: ...


@dataclass(frozen=True)
class Held:
    """What this rank holds of a flat tensor of `numel` elements: (offset, 1-D tensor) each."""

    numel: int
    chunks: list[tuple[int, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """A training state at one moment: the tensors that this rank writes, and the numbers."""

    tensors: dict[str, Held]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Keys:
    """How keys of tensors begin: replicas that drift must not be taken for copies of each other."""

    weights: str
    base: str
    buffers: str
    suffix: str

    @staticmethod
    def of(backend: Backend) -> Keys:
        """This replica's; with one replica, or where each saves for itself, there is nothing to tell apart."""
        return Keys.numbered(backend.replica if _together(backend) > 1 else None)

    @staticmethod
    def numbered(replica: int | None) -> Keys:
        suffix = "" if replica is None else f"@{replica}"
        return Keys(f"weights{suffix}", f"base{suffix}", f"buffers{suffix}", suffix)

    def family(self, family: Family) -> str:
        return family.name if family.same_on_all_replicas else f"{family.name}{self.suffix}"


def _together(backend: Backend) -> int:
    """Replicas that save one state together."""
    return 1 if backend.groups.apart else backend.replicas


def chunk_of(backend: Backend, piece: Piece) -> tuple[str, int, int]:
    """A piece as any rank knows it: (parameter, offset, length)."""
    return backend.layout.parameters[piece.parameter].name, piece.offset, piece.length


def chunks_of(state: TrainingState) -> list[tuple[str, int, int]]:
    """All that this rank holds, as any rank knows it: the pieces of the weights, whose state lies as they do, and what
    families keep of a matrix that this rank owns."""
    out = [chunk_of(state.backend, piece) for piece in state.backend.layout.pieces]
    for name, key, vector in owned_vectors(state):
        layout = vector.space.layout
        out += [(f"{name}/{key}/{layout.parameters[p.parameter].name}", p.offset, p.length) for p in layout.pieces]
    return out


def owned_vectors(state: TrainingState) -> Iterator[tuple[str, str, Vector]]:
    """(family, key, Vector) of those whose tensors lie whole on one rank each."""
    for family in state.families.values():
        for key, value in family.state_dict().items():
            if isinstance(value, Vector) and isinstance(value.space, OwnedSpace):
                yield family.name, key, value


def take_snapshot(
    state: TrainingState, step: int, extra: dict[str, Any], mine: set[tuple[str, int, int]], *, copy: bool
) -> Snapshot:
    """The state as it is now; the pieces in `mine`, some of `chunks_of`, are this rank's to write.

    With `copy` the tensors are copied to host memory (weights, base state and families of `mine`), else they are
    the live ones. No communication. Raises StaleWeights inside a perturbed pass or before `resync`, Unsupported for
    state that cannot be resharded, UserError where `extra` is not JSON.
    """
    backend, space = state.backend, state.space
    space.check_generation()
    space.copies.refuse_stale("a save")
    if space.copies.perturbations:
        raise StaleWeights("a save is refused inside a perturbed pass; save when the step has ended.")
    keep: Callable[[Tensor], Tensor] = _to_host if copy else _live
    layout, tensors = backend.layout, dict[str, Held]()

    prefix = Keys.of(backend)

    def hold(key: str, parameter: Parameter, piece: Piece, value: Tensor, name: str = "") -> None:
        if (name or parameter.name, piece.offset, piece.length) in mine:
            tensors.setdefault(key, Held(parameter.numel)).chunks.append((piece.offset, keep(value)))

    def of(piece: Piece) -> Parameter:
        return layout.parameters[piece.parameter]

    for piece, weights in zip(layout.pieces, backend.masters, strict=True):
        hold(f"{prefix.weights}/{of(piece).name}", of(piece), piece, weights)
    base: dict[str, dict[str, Any]] = {}
    _refuse_state_elsewhere(backend)
    for piece, key, value in backend.base_states() if backend.base is not None else ():
        name = of(piece).name
        if isinstance(value, Tensor) and value.dim() and value.numel() == piece.length:
            hold(f"{prefix.base}/{name}/{key}", of(piece), piece, value)
            told = ELEMENTS
        else:
            told = encode(value, f"the optimizer's state {key!r} of parameter {name}")
        base.setdefault(name, {})[key] = told
    number = backend.replica if _together(backend) > 1 else 0
    families: dict[str, dict[str, Any]] = {}
    of_parameters: dict[str, list[str]] = {}
    for family in state.families.values():
        noted = families[family.name] = {}
        of_parameters[family.name] = [p.name for p in family.space.layout.parameters]
        own_key, others = prefix.family(family), family.same_on_all_replicas and number > 0
        for key, value in family.state_dict().items():
            if isinstance(value, Vector):
                own = value.space.layout  # of some of the parameters, where the family is
                for piece, part in zip(own.pieces, value.tensors, strict=True) if not others else ():
                    parameter = own.parameters[piece.parameter]
                    owned = isinstance(value.space, OwnedSpace)
                    name = f"{family.name}/{key}/{parameter.name}" if owned else ""
                    hold(f"{own_key}/{key}/{parameter.name}", parameter, piece, part, name)
                noted[key] = ELEMENTS
            else:
                noted[key] = encode(value, f"{key!r} of the state of {family.name}")
    if backend.rank == 0:
        for key, buffer in persistent_buffers(backend.module).items():
            tensors[f"{prefix.buffers}/{key}"] = Held(buffer.numel(), [(0, keep(local(buffer).reshape(-1)))])
    for key, generator in random_states(backend).items():
        tensors[key] = Held(generator.numel(), [(0, generator)])
    if copy and backend.device.type == "cuda":
        torch.cuda.current_stream(backend.device).synchronize()  # once, for all that `_to_host` has asked for
    metadata = {
        "format": FORMAT, "step": step, "world": backend.groups.job.size, "backend": backend.name,
        "replica": number, "replicas": _together(backend),
        "parameters": {p.name: list(p.shape) for p in layout.parameters},
        "base": base, "groups": encode_groups(backend), "families": families,
        "of_parameters": {n: own for n, own in of_parameters.items() if len(own) < len(layout.parameters)},
        "clock": {"samples": state.clock.samples, "steps": state.clock.steps},
        "extra": _as_json(extra),
    }  # fmt: skip
    return Snapshot(tensors, metadata)


def _live(tensor: Tensor) -> Tensor:
    """Without its graph; a detach for each of a thousand tensors would be a good part of a version's cost."""
    return tensor.detach() if tensor.requires_grad else tensor


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is on its way, into pinned memory, so that the next need not wait for it."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def encode_groups(backend: Backend) -> list[dict[str, Any]]:
    """The hyper-parameters of each param group, as JSON."""
    return [
        {k: encode(v, f"hyper-parameter {k!r} of param group {i}") for k, v in group.items() if k not in HOW_NOT_WHAT}
        for i, group in enumerate(backend.param_groups)
    ]


def persistent_buffers(module: nn.Module | None) -> dict[str, Tensor]:
    """The buffers that belong to the module's `state_dict`.

    Found without asking for it: FSDP2 reshards in `state_dict()`, and where one rank alone reshards kept weights, it
    gathers in the next forward while the others do not, and the job hangs.
    """
    return {
        plain_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, child in (module.named_modules() if module is not None else ())
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    }


def random_states(backend: Backend) -> dict[str, Tensor]:
    """This rank's generators: bytes on the host, by key."""
    rank = backend.groups.job.rank
    out = {f"rng/{rank}/cpu": torch.get_rng_state()}
    if backend.compute_device.type == "cuda":
        out[f"rng/{rank}/gpu"] = torch.cuda.get_rng_state(backend.compute_device)
    return out


def _refuse_state_elsewhere(backend: Backend) -> None:
    known = {id(key) for key in backend.slot_keys}
    for key in backend.base.state if backend.base is not None else ():
        if id(key) not in known:
            what = f"of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
            raise Unsupported(
                f"{type(backend.base).__name__} keeps state under {what}, which is none of the trained parameters; "
                "a checkpoint holds state by parameter."
            )


def _as_json(extra: dict[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"extra[{key!r}] cannot be saved: {error}; give numbers, strings, lists and dicts."
            ) from None
    return extra


OF_A_REPLICA = ("base", "groups", "families", "of_parameters", "clock")
"""What of the metadata may differ between replicas."""


def merge_metadata(metadata: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One account of all ranks': what each knows of the base's state, rank 0's for the rest, and that of each replica.

    Raises Unsupported where ranks of a replica hold different numbers for one parameter: no other world size could go
    on from them.
    """
    told: dict[int, dict[str, Any]] = {}
    for rank, own in enumerate(metadata):
        mine = told.setdefault(own["replica"], {**{key: own[key] for key in OF_A_REPLICA}, "base": {}})
        for name, state in own["base"].items():
            if json.dumps(mine["base"].setdefault(name, state)) != json.dumps(state):
                raise Unsupported(
                    f"the optimizer's state of parameter {name} differs between ranks ({mine['base'][name]} and on "
                    f"rank {rank} {state}); numbers must be the same on all ranks to be saved."
                )
    return {**metadata[0], **told[metadata[0]["replica"]], "of_replica": [told[number] for number in sorted(told)]}


def metadata_for(backend: Backend, metadata: dict[str, Any]) -> tuple[Keys, dict[str, Any]]:
    """How the keys of this replica's part of a saved state begin, and its metadata.

    From one replica all can begin. Raises UserError for another number of replicas.
    """
    saved = metadata.get("replicas", 1)
    if saved == 1:
        return Keys.numbered(None), metadata
    if saved != _together(backend):
        raise UserError(
            f"the checkpoint is of {saved} replicas that have drifted apart, this job has "
            f"{_together(backend)}; start as many."
        )
    return Keys.numbered(backend.replica), {**metadata, **metadata["of_replica"][backend.replica]}
