"""The random numbers that a data set draws: its own, a function of (seed, epoch, sample) and of nothing else.

    with drawing_beside_others(seed) as draws:      # another thread trains, and its dropout draws meanwhile
        draws.start("sample", epoch, i)
        dataset[i]

torch, Python's `random` and numpy each have one generator for all threads. A thread that reads ahead must not touch it:
the training thread would get other dropout in SAM's second pass, and the data set numbers that were drawn before.
torch's can be had apart, because every operation that draws says so and takes another generator (`_Diverted`, for
this thread alone). Python's and numpy's cannot: who draws from them is read where nobody draws at the same time.
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.replay.slot import generators_of
from elastic_lsopt.space.random.noise import block_seed

_TORCH_SEED, _NUMPY_SEED = 2**63 - 1, 2**32 - 1


class Draws(ABC):
    """Where the numbers of the next sample start: at the run's `seed` and the sample's own key."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, *key: int | str) -> None:
        """What is drawn from here on depends on (seed, key) alone. Costs 10 to 40 us."""
        self._start(block_seed(self.seed, "data", *key))

    @abstractmethod
    def _start(self, seed: int) -> None: ...


@contextmanager
def drawing_alone(seed: int) -> Iterator[Draws]:
    """Draw from the common generators while no other thread does; afterwards they go on as if nothing had happened."""
    before = _Common()
    try:
        yield _FromCommon(seed)
    finally:
        before.restore()


@contextmanager
def drawing_beside_others(seed: int) -> Iterator[Draws]:
    """Draw from generators of this thread's own: the numbers that `drawing_alone` gives, by torch's operations.

    Raises CommonGenerator at the end where somebody has drawn from Python's or numpy's generator meanwhile: it may have
    been the data set, whose numbers were then nobody's.
    """
    before = _python_and_numpy()
    with _Diverted() as diverted:
        yield _FromOwn(seed, diverted)
    if moved := _moved(before, _python_and_numpy()):
        raise CommonGenerator(moved)


@contextmanager
def trying(seed: int) -> Iterator[Draws]:
    """As `drawing_beside_others`, but where nobody else draws, so that what has moved was moved by the data set.

    Raises CommonGenerator also where it draws from torch's common generator in spite of the diversion: it seeds it,
    names it, or draws in threads of its own. The common generators go on as if nothing had happened.
    """
    common = _Common()
    try:
        with drawing_beside_others(seed) as draws:
            yield draws
        if common.torch_has_moved():
            raise CommonGenerator("torch's common generator, by hand or in threads of its own")
    finally:
        common.restore()


class CommonGenerator(Exception):
    """Samples were drawn from a generator that other threads share; the text says from which."""


class _FromCommon(Draws):
    def _start(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed & _NUMPY_SEED)
        for generator in generators_of(_present_device()):
            generator.manual_seed(seed & _TORCH_SEED)


class _FromOwn(Draws):
    def __init__(self, seed: int, diverted: _Diverted) -> None:
        super().__init__(seed)
        self._diverted = diverted

    def _start(self, seed: int) -> None:
        self._diverted.manual_seed(seed & _TORCH_SEED)


class _Diverted(TorchDispatchMode):
    """Gives each operation of this thread that draws a generator of its own, unless it was called with one.

    A mode belongs to a thread. A process that is forked in it, as a DataLoader's worker, would inherit it with the same
    numbers as its siblings: there it does nothing, and the worker draws from what DataLoader has seeded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process, self._seed = os.getpid(), 0
        self._generators: dict[torch.device, torch.Generator] = {}

    # Not torch's own enter and exit: beside the thread's stack they set flags of the whole process, by which
    # torch.compile in the training thread leaves a frame uncompiled.
    def __enter__(self) -> _Diverted:
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        _pop_mode()

    def manual_seed(self, seed: int) -> None:
        """Where the generators of all devices start."""
        self._seed = seed
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        if not draws or os.getpid() != self._process or not _at_random(func, args, kwargs):
            return func(*args, **kwargs)
        return _taking_generator(func)(*args, **{**kwargs, "generator": self._of(args, kwargs)})

    def _of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Generator:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        device = torch.device(kwargs.get("device") or ("cpu" if tensor is None else tensor.device))
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
            self._generators[device].manual_seed(self._seed)
        return self._generators[device]


def _at_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """False where an operation that could drop something is told not to (attention without dropout)."""
    names = [(a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments]
    given = dict(names) | dict(zip((name for name, _ in names), args, strict=False)) | dict(kwargs)
    return given.get("dropout_p", 1.0) != 0.0 and given.get("train", True) is not False


@cache
def _taking_generator(func: Any) -> Any:
    """The overload of an operation that takes a generator."""
    own = _arguments(func)
    if "generator" in own:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        takes = _arguments(overload)
        if takes.pop("generator", None) and takes == own:
            return overload
    raise UserError(
        f"the data set calls {func}, which draws from torch's common generator and takes no other; "
        "let it draw by torch.rand, torch.bernoulli or the like."
    )


def _arguments(func: Any) -> dict[str, str]:
    return {a.name: str(a.type) for a in func._schema.arguments}


class _Common:
    """The state of the generators that all threads share."""

    def __init__(self) -> None:
        self._others = _python_and_numpy()
        self._torch = [(g, g.get_state()) for g in generators_of(_present_device())]

    def torch_has_moved(self) -> bool:
        """Whether anybody has drawn from torch's or seeded it."""
        return any(not torch.equal(state, generator.get_state()) for generator, state in self._torch)

    def restore(self) -> None:
        """Put it back."""
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])
        for generator, state in self._torch:
            generator.set_state(state)


def _python_and_numpy() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _moved(before: tuple[Any, Any], now: tuple[Any, Any]) -> str:
    """Whose generator has moved, in words; "" where none has."""
    (_, *mine), (_, *others) = before[1], now[1]
    same_numpy = all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))
    names = [*(["Python's random"] if before[0] != now[0] else []), *([] if same_numpy else ["numpy's random"])]
    return " and ".join(names)


def _present_device() -> torch.device:
    """The GPU of this thread where one is in use, else the CPU."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
