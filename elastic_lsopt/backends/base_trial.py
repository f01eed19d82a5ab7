"""Does a base optimizer do on this backend's pieces what it does on whole parameters? It is known, or it is tried.

ZeRO 1 to 3 give the base one flat tensor per group, cut between the ranks wherever its middle is; FSDP2 gives it
DTensors, cut by rows. What works element by element cannot tell. What takes the norm of a matrix, or asks how many
dimensions a parameter has, computes something else there, and nothing would say so: the loss falls all the same.

[Note: the trial] A twin of the optimizer, with its class, hyper-parameters and attributes but small parameters of its
own, takes a few steps on whole tensors, another on cut ones. The optimizer itself, its state and torch's generators are
left alone. What comes into play only after more steps than these is not seen, unless it keeps a state of another shape.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.errors import UserError
from elastic_lsopt.updates.torch_update import ELEMENT_WISE

STEPS = 8
AGREE = 1e-4
"""How far two trials may end from each other, as a share of the way that they went; rounding is far below."""
RATE = 0.1
"""The learning rate of a trial: the user's may be 0 while it warms up."""
ROWS, REST = 5, (3, 2, 2, 2)
"""The small parameters' rows, and the sizes of their further dimensions."""

Tensors = list[list[Tensor]]
"""By param group and parameter."""
Cut = Callable[[Tensor], Tensor]


class Untried(UserError):
    """The twin raised: its class and words are the reason."""


def refuse_closure(base: torch.optim.Optimizer) -> None:
    """Raise UserError for a base whose step asks for a closure: its own passes would be no passes of a method."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"base {type(base).__name__}: its step() needs a closure, because it takes gradients itself; use a base "
            "that steps with the gradient which the method gives it (SGD, Adam, AdamW …)."
        )


def reason_against_flat(base: torch.optim.Optimizer, dims: Sequence[int], device: torch.device) -> str | None:
    """Why the base must not get flat pieces of several parameters, in half a sentence; None where it may.

    `dims` are the numbers of dimensions that the model's parameters have. No communication.
    """
    if type(base) in ELEMENT_WISE:
        return None
    reason = None
    for dtype in (torch.float64, torch.float32):
        trial = _Trial(base, [sorted(set(dims))] * len(base.param_groups), ROWS, dtype, device)
        try:
            whole = trial.run(trial.start, trial.gradients)
            halves = [trial.run(*trial.flat_half(number)) for number in (0, 1)]
        except Untried as error:
            reason = str(error)
            continue
        if trial.odd_state is not None:
            return f"it keeps the state {trial.odd_state!r} in another shape than the parameter's"
        flat = [torch.cat([half[g][0] for half in halves]) for g in range(len(whole))]
        wanted = [torch.cat([t.reshape(-1) for t in group]) for group in whole]
        apart = sum(float((a - b).square().sum()) for a, b in zip(flat, wanted, strict=True))
        return _verdict(apart, trial.way(whole))
    return reason


def reason_against_rows(
    base: torch.optim.Optimizer,
    shards: int,
    device: torch.device,
    cut: Cut,
    local: Callable[[Tensor], Tensor],
    total_: Callable[[Tensor], Tensor],
) -> str | None:
    """Why the base must not get parameters in sharded rows; None where it may (collective where the class is tried).

    `cut` makes a whole tensor this rank's DTensor among `shards`, `local` gives its part, `total_` sums over the job.
    """
    if type(base) is torch.optim.Rprop:
        return (
            "it writes by index, which DTensors cannot (lso.UpdateOptimizer(params, 'Rprop', …) steps on their pieces)"
        )
    if type(base) in ELEMENT_WISE:
        return None
    dims = [sorted({p.dim() for p in group["params"]}) for group in base.param_groups]
    reason = ""
    for dtype in (torch.float64, torch.float32):
        trial = _Trial(base, dims, max(ROWS, 2 * shards - 1), dtype, device)
        apart, failed = 0.0, 0.0
        whole: Tensors = []
        try:
            whole = trial.run(trial.start, trial.gradients)
            sharded = trial.run(_each(cut, trial.start), [_each(cut, g) for g in trial.gradients])
            for mine, wanted in _pairs(sharded, _each(cut, whole)):
                apart += float((local(mine) - local(wanted)).square().sum())
        except Untried as error:
            reason, failed = str(error), 1.0
        told = total_(torch.tensor([apart, failed], dtype=torch.float64, device=device))
        apart, failed = told.tolist()
        if not failed:
            return _verdict(apart, trial.way(whole))
    return reason or "it raised on another rank"


def _verdict(square_distance: float, way: float) -> str | None:
    share = square_distance**0.5 / way if way else square_distance**0.5
    if share <= AGREE:
        return None
    return f"on small parameters of both kinds its steps end {share:.1e} of their way apart (limit {AGREE:.0e})"


class _Trial:
    """Small parameters for each param group, gradients for a few steps, and what a twin makes of them."""

    def __init__(
        self, base: torch.optim.Optimizer, dims: Sequence[Sequence[int]], rows: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._base, self._device = base, device
        self.odd_state: str | None = None
        draw = torch.Generator().manual_seed(0)
        shapes = [[(rows, *REST[: d - 1]) if d else () for d in group] for group in dims]

        def drawn() -> Tensors:
            group = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in of] for of in shapes]
            return _each(lambda t: t.to(device, dtype), group)

        self.start = drawn()
        self.gradients = [drawn() for _ in range(STEPS)]

    def flat_half(self, number: int) -> tuple[Tensors, list[Tensors]]:
        """What one of two ranks has under ZeRO: of each group one flat piece, which ends inside of a parameter."""

        def half(tensors: Tensors) -> Tensors:
            flat = [torch.cat([t.reshape(-1) for t in group]) for group in tensors]
            return [[t.tensor_split([t.numel() // 2])[number].clone()] for t in flat]

        return half(self.start), [half(g) for g in self.gradients]

    def run(self, start: Tensors, gradients: Sequence[Tensors]) -> Tensors:
        """Where a twin that begins there ends. Raises Untried for whatever it raises."""
        params = [[nn.Parameter(t.detach().clone()) for t in group] for group in start]
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            try:
                twin = _twin(self._base, params)
                for step in gradients:
                    for p, g in _pairs(params, step):
                        p.grad = g.detach().clone()
                    twin.step()
            except Exception as error:  # a stranger's code: whatever it raises is why it cannot be tried
                words = " ".join(f"{type(error).__name__}: {error}".split())
                raise Untried(f"it cannot be tried on small parameters ({words[:200]})") from error
        self.odd_state = self.odd_state or next(_odd_states(twin), None)
        return [[p.detach() for p in group] for group in params]

    def way(self, end: Tensors) -> float:
        return sum(float((a - b).square().sum()) for a, b in _pairs(end, self.start)) ** 0.5


def _twin(base: torch.optim.Optimizer, params: list[list[nn.Parameter]]) -> Any:
    """See [Note: the trial]. Attributes that hold the base's parameters hold the small ones in the twin."""
    kind: Any = type(base)
    if hasattr(kind, "__del__"):  # it might free what belongs to the original
        kind = type(kind.__name__, (kind,), {"__del__": lambda self: None})
    twin = kind.__new__(kind)
    pairs = zip(base.param_groups, params, strict=True)
    memo = {id(p): small[0] for group, small in pairs for p in group["params"] if small}
    for name, value in vars(base).items():
        if name in ("param_groups", "state") or (name == "step" and callable(value)):
            continue  # a learning-rate scheduler wraps the step of the object that it knows
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            vars(twin)[name] = OrderedDict()
        elif isinstance(value, torch.optim.Optimizer):
            vars(twin)[name] = _twin(value, params)
        else:
            vars(twin)[name] = _copied(value, memo)
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**_hyperparameters(group, memo), "params": small}
        for group, small in zip(base.param_groups, params, strict=True)
    ]
    if callable(into_training := getattr(twin, "train", None)):
        into_training()  # schedule-free optimizers refuse to step before
    return twin


def _hyperparameters(group: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    own = {key: _copied(value, memo) for key, value in group.items() if key not in ("params", "param_names")}
    if "lr" in own:
        own["lr"] = torch.full_like(own["lr"], RATE) if isinstance(own["lr"], Tensor) else RATE
    return own


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return deepcopy(value, dict(memo))
    except Exception:  # process groups, handles of a kernel's library
        return value


def _odd_states(twin: Any) -> Iterator[str]:
    """The names of states that are neither a number nor of their parameter's shape."""
    for p, state in twin.state.items():
        for name, value in state.items():
            for t in value if isinstance(value, list | tuple) else [value]:
                if isinstance(t, Tensor) and t.numel() != 1 and t.shape != p.shape:
                    yield str(name)


def _each(change: Cut, tensors: Tensors) -> Tensors:
    return [[change(t) for t in group] for group in tensors]


def _pairs(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for mine, theirs in zip(a, b, strict=True):
        yield from zip(mine, theirs, strict=True)
