"""A model that has shapes and no memory yet, and what its parameters and buffers are filled from.

with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
weights = FolderWeights(folder, model, missing=lambda: DrawnWeights(model, seed))
give_buffers(model, weights)               # then wrap it: fully_shard, or DeepSpeed's partitioning
give_memory(model, device)                 # this rank's shards, not yet filled
fill(backend, weights)                     # from here on it trains
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.layout import plain_name


class Weights(Protocol):
    """Where a model's weights come from."""

    def holds(self, name: str) -> bool:
        """Whether a parameter or buffer is to be had here."""
        ...

    def copy_to(self, target: Tensor, name: str, offset: int) -> None:
        """Write elements [offset, offset + target.numel()) of the flattened parameter or buffer `name`, a tied one
        under any of its names, into `target`: a contiguous 1-D view of any dtype on any device."""
        ...


class WholeWeights:
    """Those of a model that this process holds whole."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def holds(self, name: str) -> bool:
        return name in self._tensors

    def copy_to(self, target: Tensor, name: str, offset: int) -> None:
        target.copy_(self._tensors[name].detach().reshape(-1)[offset : offset + target.numel()])


@contextmanager
def initialising(model: Any) -> Iterator[Callable[[], None]]:
    """A function that runs transformers' initialisation of the whole model, also where that has been done before.

    As in its constructors, what is tied is initialised by its source alone: a head would else draw over the embedding.
    """
    done = "_is_hf_initialized"  # the mark that transformers leaves on what it has initialised
    marked = [each for each in [*model.modules(), *model.parameters()] if each.__dict__.pop(done, False)]
    tied = [name.rpartition(".") for name in getattr(model, "all_tied_weights_keys", None) or {}]
    owners = [(model.get_submodule(owner), own, model.get_parameter(f"{owner}.{own}")) for owner, _, own in tied]
    for owner, own, parameter in owners:
        owner._parameters[own] = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
    try:
        with torch.no_grad():
            yield model.initialize_weights
    finally:
        for owner, own, parameter in owners:
            owner._parameters[own] = parameter
        for each in marked:
            setattr(each, done, True)


class _Written(TorchDispatchMode):
    """Notes which memory is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self.storages.add(args[0].untyped_storage()._cdata)
            if args[0].is_meta:
                return args[0]
        return func(*args, **(kwargs or {}))


def give_buffers(model: nn.Module, weights: Weights) -> None:
    """Memory and values for the model's buffers: those of `weights` where it holds them, else the initialisation's.

    Rotary tables and the like are in no file. Raises Unsupported for a buffer that neither of the two gives.
    """
    owners = [(name.rpartition("."), buffer) for name, buffer in model.named_buffers()]
    for (owner, _, own), buffer in owners:
        model.get_submodule(owner)._buffers[own] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    with initialising(model) as initialise, _Written() as written:
        initialise()
    for name, buffer in model.named_buffers():
        if weights.holds(name):
            weights.copy_to(buffer.view(-1), name, 0)
        elif buffer.numel() and buffer.untyped_storage()._cdata not in written.storages:
            raise Unsupported(f"the buffer {name} is in no file, and {type(model).__name__}'s initialisation leaves it")


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory, without values, for the parameters that have none; under `fully_shard` for this rank's shards alone."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if (tie := getattr(model, "tie_weights", None)) is not None:
        tie(recompute_mapping=False)  # each name of a tied parameter was given memory of its own


@torch.no_grad()
def fill(backend: Backend, weights: Weights) -> None:
    """Give every master, working copy and frozen parameter of this rank its values; masters keep all of fp32.

    Each rank fills what it holds. Costs the reading of it, and what the backend needs to make gathered copies right
    (collective).
    """
    assert backend.module is not None
    backend.drop_gathered()
    names = [p.name for p in backend.layout.parameters]
    for piece, master in zip(backend.layout.pieces, backend.masters, strict=True):
        weights.copy_to(master, names[piece.parameter], piece.offset)
    if backend.separate_master and backend.layout.pieces:
        torch._foreach_copy_(list(backend.working), backend.masters)
    for name, parameter in backend.module.named_parameters():
        if not parameter.requires_grad:
            offset, part = backend.part_of(parameter)
            weights.copy_to(part, plain_name(name), offset)
    backend.refresh_gathered()
