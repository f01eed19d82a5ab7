"""The face for any torch loop: a torch optimizer around a torch optimizer, whose step owns the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elastic_lsopt.api.accumulation import Accumulation, accelerate_goes_on
from elastic_lsopt.api.base_view import refuse_maximized
from elastic_lsopt.api.owners import owners_of, refuse_not_averaged
from elastic_lsopt.api.refusals import refuse_halves, refuse_mover, refuse_while_moved
from elastic_lsopt.api.saved_state import refuse_other_names, renamed
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.closure_oracle import ClosureOracle
from elastic_lsopt.oracle.curvature.compute_type import FP16
from elastic_lsopt.oracle.family import Family, Stateful
from elastic_lsopt.oracle.method import Method, State
from elastic_lsopt.oracle.observation import refuse_unseen
from elastic_lsopt.oracle.split.logits import NO_LOGITS
from elastic_lsopt.oracle.step_report import StepReport, log
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import plain_name
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of

C = TypeVar("C", bound=Callable[[], Any])
SAMPLES, STEPS = "landscape_samples", "landscape_steps"
"""Keys of the first parameter group: the sample clock."""
GIVEN = (
    "base", "method", "max_grad_norm", "samples_per_step", "_seed", "_clock", "_model", "_kept", "last_step",
)  # fmt: skip
"""What a copy takes as it is."""


class LandscapeOptimizer(torch.optim.Optimizer):
    """`step(closure)` asks the method for its gradient and lets `base` step with it: plain torch, DDP, FSDP2.

        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = lso.LandscapeOptimizer(torch.optim.SGD([w], lr=0.1), lso.SAM(rho=1.0))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> float(optimizer.step(closure))
        2.0
        >>> round(w.item(), 3)                        # the gradient at w + 1 is 3
        1.7

    `base` is a torch optimizer already built; its `param_groups` and `state` are shared, so learning-rate schedulers
    attach to either. `max_grad_norm` clips the combined gradient by its global norm (0 or None: off).
    `samples_per_step` is the global batch, `total_samples` the length of the run, for schedules on the sample clock.
    Parameters have names where `base` was built from `model.named_parameters()`, else their numbers. `model` is who
    holds them, for its buffers (batch norm's statistics) and the type of its forward; by default it is found.
    The layout is read again whenever the groups' trainable parameters changed (FSDP2's `fully_shard`, accelerate's
    `prepare`; after the first step by freezing, unfreezing and adding).
    Raises UserError for a DeepSpeed optimizer (use `lso.initialize`), for fp16 in parameters, autocast or a GradScaler,
    and for a base that cannot step on sharded rows.
    """

    _step_supports_amp_scaling = True  # GradScaler then calls step() unconditionally, so that it can be refused
    # accelerate's wrapper would drop the loss that step() returns, and has no accumulate() and no last_step. What it
    # takes for prepared it hands back as it is, and asks for `step_was_skipped` and `optimizer`.
    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(
        self,
        base: torch.optim.Optimizer,
        method: Method,
        *,
        max_grad_norm: float | None = None,
        samples_per_step: int = 1,
        total_samples: int | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        keep: Sequence[Stateful] = (),
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer) or type(base).__module__.startswith("deepspeed"):
            raise UserError(
                f"base is a {type(base).__name__}; give a torch optimizer (an update: "
                "lso.UpdateOptimizer(model.parameters(), update, lr=…)), or use lso.initialize(…) for DeepSpeed."
            )
        refuse_halves(method)
        if getattr(method, "needs_logits", False):
            raise UserError(f"{type(method).__name__} needs the logits, which a closure does not give: {NO_LOGITS}")
        if (update := updates_of(base)) is not None:
            refuse_unseen(update.looking(), None)
        refuse_maximized(method, base.param_groups, update)
        refuse_mover(method, update, steps_base=True)
        LandscapeStep.refuse_unknown_length(method, keep, SampleClock(total_samples=total_samples))
        self.base, self.method = base, method
        self.max_grad_norm, self.samples_per_step = max_grad_norm, samples_per_step
        self._seed, self._clock = seed, SampleClock(total_samples=total_samples)
        self._model, self._kept = model, tuple(keep)
        self._step: LandscapeStep | None = None
        self._known: list[tuple[int, bool]] = []
        self._accumulation = Accumulation()
        self._oracle: ClosureOracle | None = None
        self._pending_state: dict[str, Any] | None = None
        self.last_step: StepReport | None = None
        self._keep_clock(self._clock)
        self._share()

    def _share(self) -> None:
        """What torch.optim.Optimizer.__init__ makes, less its own parameter list: the base's is the only one."""
        self.defaults = self.base.defaults
        for name in (
            "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
            "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
        ):  # fmt: skip
            setattr(self, name, getattr(self.base, name))

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy((model, optimizer))` and pickle, as torch's: all but hooks; its space is its own."""
        if self._step is not None:
            refuse_while_moved(self._step.space, "a copy is refused")
        pending = self._step.state_dict() if self._step is not None else self._pending_state
        return {**{name: getattr(self, name) for name in GIVEN}, "_pending_state": pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _step=None, _known=[], _accumulation=Accumulation(), _oracle=None)
        self._share()

    # -- what it shares with the base --------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        added = {**self.base.defaults, **param_group}
        refuse_maximized(self.method, [added], None, "a param group")
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty the gradients; nothing between the closures of one pass, whose gradients add up."""
        if self._oracle is None or not self._oracle.keeps_gradient:
            self.base.zero_grad(set_to_none=set_to_none)

    @property
    def optimizer(self) -> LandscapeOptimizer:
        """Itself: what accelerate's wrapper would be around."""
        return self

    # -- the step ----------------------------------------------------------------------------------------------

    @property
    def space(self) -> ParameterSpace:
        """The space of the parameters as they are now placed."""
        return self._current().space

    @property
    def backend(self) -> Backend:
        """Where the parameters lie now. (With `space`, `families` and `clock`: what `Checkpointer` saves.)"""
        return self._current().backend

    @property
    def families(self) -> Mapping[str, Family]:
        """All that survives a step beside weights and the base's own state, by name."""
        return self._current().families

    @property
    def method_state(self) -> State:
        return self._current().state

    @property
    def clock(self) -> SampleClock:
        return self._current().clock

    @clock.setter
    def clock(self, clock: SampleClock) -> None:
        self._current().clock = clock
        self._keep_clock(clock)

    def step(self, closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]] | None = None) -> float:  # type: ignore[override]
        """One optimizer step; returns the loss at the weights before it (the mean over ranks). `last_step` tells more.

        `closure` empties the gradient (`optimizer.zero_grad()`), runs forward and backward and returns the loss; it
        is run once a pass, with the same dropout. A method with several parts takes a list of closures, one a part; of
        closures handed to `accumulate` it takes the last. Prepared by accelerate it does nothing, and returns 0, while
        accelerate's `accumulate` says that the update goes on. Raises UserError without a closure, for a gradient that
        a backward pass outside of step() has left, and for a GradScaler's call.
        """
        if hasattr(self, "grad_scale"):  # GradScaler's sign that it calls
            for name in ("grad_scale", "found_inf"):
                delattr(self, name)
            raise UserError(FP16)
        if closure is None and not self.state and all(float(g.get("lr", 1.0)) == 0.0 for g in self.param_groups):
            # torch.distributed.checkpoint makes a fresh optimizer's state so: zero gradients, learning rates of zero.
            if updates_of(self.base) is None:
                self.base.step()
            return 0.0
        if closure is None:
            raise UserError(
                "step() needs a closure, because the method takes its gradients itself: def closure(): "
                "optimizer.zero_grad(); loss = …; loss.backward(); return loss (DeepSpeed: lso.initialize)."
            )
        if "_is_accelerate_prepared" in vars(self) and accelerate_goes_on():
            return 0.0
        closures = [closure] if callable(closure) else closure
        if not isinstance(closures, Sequence) or not all(callable(c) for c in closures):
            raise UserError(f"step() takes a closure or a list of closures, got {type(closure).__name__}.")
        current = self._current()
        with current.informing():
            together = self._accumulation.take(closure)
            if together is None:
                self._accumulation.refuse_foreign(current.backend)
        self._oracle = ClosureOracle(
            current.space, current.backend, together or closures, current.clock, accumulating_losses=bool(together)
        )
        try:
            with current.informing():
                self.last_step = current.take(self._oracle, self.samples_per_step)
        finally:
            self._oracle = None
            self._accumulation.note_left(current.backend)
        self._keep_clock(current.clock)
        return self.last_step.loss

    def accumulate(self, closure: C) -> C:
        """Hand in the closure of one of several micro-batches whose gradients the next step adds up; returns it.

        A decorator. `step(closure)` with the last one runs them all in each pass, so what they return adds up too: give
        back what you call backward on, the loss over the number of micro-batches. What a call of one before the step
        leaves in the parameters is dropped. A method with several parts takes a multiple of them.
        """
        self._accumulation.add(closure)
        return closure

    def _current(self) -> LandscapeStep:
        params = [p for group in self.param_groups for p in group["params"]]
        known = [(id(p), p.requires_grad) for p in params]
        if self._step is None or known != self._known:
            if self._step is not None:
                refuse_while_moved(self._step.space, "parameters cannot be frozen, unfrozen or added")
            if self._step is not None and self._clock.steps and {p for p, _ in self._known} - {p for p, _ in known}:
                raise UserError(
                    "parameters were removed or replaced after the first step; build a new LandscapeOptimizer."
                )
            had = {p for p, _ in self._known} if self._clock.steps else set()
            for p in params:
                # The base would go on stepping a frozen one with what the last pass left; what passes have left in one
                # that was not trained yet is no gradient of this step.
                if not p.requires_grad or (had and id(p) not in had):
                    p.grad = None
            self._known, backend = known, self._backend(params)
            if self._step is None:
                self._step = LandscapeStep(backend, self.method, self._seed, self._clock, kept=self._kept)
            else:
                self._step = self._step.onto(backend)
            if self._pending_state is not None:
                if not self._pending_state.get("families", True):
                    self._tell_of_what_begins_anew(self._step)
                self._step.load_state_dict(self._pending_state, self._names(params))
                self._keep_clock(self._step.clock)
                self._pending_state = None
        return self._step

    @staticmethod
    def _tell_of_what_begins_anew(step: LandscapeStep) -> None:
        if anew := [name for name, family in step.families.items() if family.state_dict()]:
            log.warning(
                "torch.distributed.checkpoint carries torch's own state and the clock alone: what %s remembered begins "
                "anew; save with optimizer.state_dict() or lso.save to go on with it.", ", ".join(anew),
            )  # fmt: skip

    def _keep_clock(self, clock: SampleClock) -> None:
        """In the first group too: torch.distributed.checkpoint carries the base's groups and state, nothing else."""
        self._clock = clock
        self.param_groups[0].update({SAMPLES: clock.samples, STEPS: clock.steps})

    def _backend(self, params: list[Tensor]) -> Backend:
        if any(p.dtype == torch.float16 for p in params):
            raise UserError(
                "fp16 parameters need loss scaling, which is refused: one scale cannot serve two passes; use bf16."
            )
        named = list(zip(self._names(params), params, strict=True))
        backend = backend_for(None, self.base, named_parameters=named, max_grad_norm=self.max_grad_norm)  # type: ignore[arg-type]
        owners = owners_of(dict(named), self._model)
        refuse_not_averaged(named, owners, changed=self._step is not None)
        backend.module, backend.outermost = owners.home, owners.roots
        return backend

    def _names(self, params: Sequence[Tensor]) -> list[str]:
        names = [plain_name(n) for group in self.param_groups for n in group.get("param_names", [])]
        return names if len(names) == len(params) else [str(i) for i in range(len(params))]

    def averaged(self, name: str = "ema") -> AbstractContextManager[Vector]:
        """Weights at the average of that name (of `keep`) inside the block, back bit for bit after it (collective)."""
        return self._current().averaged(name)

    def average(self, name: str = "ema") -> Vector:
        """The average of that name, live: read it, never write it. Raises UserError where none is kept."""
        return self._current().average(name)

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and under "landscape" the method's state and the clock."""
        own = self._pending_state if self._pending_state is not None else self._current().state_dict()
        return {**self.base.state_dict(), "landscape": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or the base's own state, which leaves the method's as it is.

        torch.distributed.checkpoint's state (`get_optimizer_state_dict`) holds the base's state and the clock; what a
        method, an update of ours or an average remembers begins anew, which the log says.

        Where other parameters are trained than when it was saved, each goes on by its name (by its place in the groups,
        where one side has no names): one of which nothing was saved begins anew, and what was saved of one that is
        frozen now is left aside, which the log says. Raises UserError where a place in the groups has another
        parameter's name than then, now or in the next step where the state cannot be of these parameters.
        """
        if self._step is not None:
            refuse_while_moved(self._step.space, "a state cannot be loaded")
        own, groups = state_dict.get("landscape"), state_dict.get("param_groups", [])
        theirs = [n for group in groups for n in group.get("param_names", [])]
        if own is not None:
            refuse_other_names(theirs, [n for group in self.param_groups for n in group.get("param_names", [])])
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "landscape"})
        if own is not None and not theirs:
            params = [p for group in self.param_groups for p in group["params"]]
            own = renamed(own, {str(place): name for place, name in enumerate(self._names(params))})
        first = self.param_groups[0]
        if own is None and STEPS in first:
            own = {"families": {}, "clock": (int(first[SAMPLES]), int(first[STEPS])), "skipped_steps": 0}
        if own is not None:
            self._pending_state = own
            self._step, self._known = None, []
        else:
            self._keep_clock(self._clock)

    def __repr__(self) -> str:
        return f"LandscapeOptimizer({self.method!r}, {self.base!r})"
