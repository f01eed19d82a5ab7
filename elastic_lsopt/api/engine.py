"""The engine: `train_batch(microbatches)` is one optimizer step, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.api.refusals import refuse_unstepped
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.errors import StaleWeights, UserError
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.eval_mode import eval_mode
from elastic_lsopt.oracle.family import Family, Stateful
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.halves_oracle import HalvesOracle
from elastic_lsopt.oracle.losses.default_loss import as_loss
from elastic_lsopt.oracle.losses.loss import Loss, LossFunction
from elastic_lsopt.oracle.method import Method, State
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.oracle.observation import refuse_unseen
from elastic_lsopt.oracle.split.logits import NO_LOGITS
from elastic_lsopt.oracle.step_report import Piggyback, StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of


class Engine:
    """A model on a backend, a base optimizer, a method. All methods are collective.

    `loss_fn(model, batch)` is the mean loss of a micro-batch (default: the Hugging Face model's own, weighed by
    tokens). `total_samples` is the length of the run, for schedules on the sample clock. Raises Unsupported and
    UserError for what is not supported.
    """

    def __init__(
        self,
        backend: Backend,
        method: Method,
        *,
        loss_fn: Loss | LossFunction | None = None,
        seed: int = 0,
        total_samples: int | None = None,
        keep: Sequence[Stateful] = (),
        consensus: Consensus | None = None,
    ) -> None:
        assert backend.module is not None
        self.backend = backend
        self.loss = as_loss(loss_fn, backend.module)
        if getattr(method, "needs_logits", False) and not isinstance(self.loss, Loss):
            raise UserError(f"{type(method).__name__} needs the logits: {NO_LOGITS}")
        clock = SampleClock(total_samples=total_samples)
        LandscapeStep.refuse_unknown_length(method, keep, clock)
        self.consensus = consensus
        """How this replica and others pull on each other; None: each step is all replicas'."""
        kept = [*keep, *(consensus.keep if consensus is not None else ())]
        self._landscape = LandscapeStep(backend, method, seed, clock, kept=kept, deals=True)
        if consensus is not None:
            consensus.bind(self._landscape)
        self._oracle = HalvesOracle if getattr(method, "halves", False) else MicroBatchOracle
        if (update := updates_of(backend.base)) is not None:
            refuse_unseen(update.looking(), self.loss)
        self._stop_requested = False
        self.piggyback: Callable[[], Piggyback] | None = None
        """What the elastic runtime lets ride on each pass's all-reduce."""
        self._inside = False
        self._trained = [p.requires_grad for p in backend.module.parameters()]
        self.last_step: StepReport | None = None
        backend.module.register_forward_pre_hook(self._refuse_stale_forward, prepend=True)

    @classmethod
    def of(
        cls,
        model: nn.Module | Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        method: Method | None = None,
        loss_fn: Loss | LossFunction | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        total_samples: int | None = None,
        keep: Sequence[Stateful] = (),
        consensus: Consensus | None = None,
    ) -> Engine:
        """The engine of a model as it is wrapped: plain, DDP, `fully_shard`, or a DeepSpeed engine (collective).

        `optimizer` is the base (a DeepSpeed engine brings its own), `method` the landscape method (None: none). Raises
        UserError for a parameter that is to be trained and is not the optimizer's.
        """
        backend = backend_for(model, optimizer, max_grad_norm=max_grad_norm)
        if optimizer is not None:
            refuse_unstepped(backend.parameters, optimizer)
        chosen = Plain() if method is None else method
        return cls(
            backend, chosen, loss_fn=loss_fn, seed=seed, total_samples=total_samples, keep=keep, consensus=consensus
        )

    @property
    def module(self) -> nn.Module:
        assert self.backend.module is not None
        return self.backend.module

    @property
    def base(self) -> torch.optim.Optimizer | None:
        """The torch optimizer that steps."""
        return self.backend.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.backend.param_groups

    @property
    def space(self) -> ParameterSpace:
        return self._landscape.space

    @property
    def method(self) -> Method:
        return self._landscape.method

    @property
    def families(self) -> Mapping[str, Family]:
        """All that survives a step beside weights and the base's own state, by name."""
        return self._landscape.families

    def add(self, family: Family) -> None:
        """From now on this is saved, mirrored and moved too. Raises UserError for a name that is taken."""
        self._landscape.add(family)

    @property
    def method_state(self) -> State:
        return self._landscape.state

    @property
    def clock(self) -> SampleClock:
        return self._landscape.clock

    @clock.setter
    def clock(self, clock: SampleClock) -> None:
        self._landscape.clock = clock

    @property
    def deal(self) -> tuple[int, int]:
        """(rank, ranks): micro-batch u of a training step is this rank's where u mod ranks is rank.

        This rank's number and the world's size; of a method with `halves`, those within this rank's half.
        """
        return self._oracle.dealt_as(self.backend)

    @property
    def skipped_steps(self) -> int:
        return self._landscape.skipped_steps

    @property
    def skipped_in_a_row(self) -> int:
        """Steps that were skipped since the last that was not; many of them mean that the weights are no good."""
        return self._landscape.skipped_in_a_row

    def request_stop(self) -> None:
        """Ask all ranks to stop: `last_step.stop` is true on all after the same step. Safe in a signal handler."""
        self._stop_requested = True
        if self.consensus is not None:
            self.consensus.told_to_stop = True

    def oracle(self, microbatches: Sequence[Any]) -> MicroBatchOracle:
        """The loss on these micro-batches of all ranks, as something one can ask."""
        return self._oracle_of(MicroBatchOracle, microbatches)

    def _oracle_of(self, kind: type[MicroBatchOracle], microbatches: Sequence[Any]) -> MicroBatchOracle:
        return kind(
            self.space, self.backend, self.loss, microbatches, self.clock,
            stop_requested=lambda: self._stop_requested, piggyback=self.piggyback,
        )  # fmt: skip

    def train_batch(self, microbatches: Sequence[Any]) -> float:
        """One optimizer step on this rank's micro-batches; returns the mean loss of the global batch before it.

        `microbatches` are plain batches (the j-th of rank r is micro-batch j * world + r of the step) or `MicroBatch`s.
        The ranks' lists may differ in length. Of a method with `halves`, rank and world are those of `deal`, and ranks
        r and r + world / 2 give the same. `last_step` tells more.
        """
        self._inside = True
        try:
            with self._landscape.informing(), self._leaving():
                self.space.copies.refuse_stale("a step")
                self._refuse_other_parameters()
                oracle = self._oracle_of(self._oracle, microbatches)
                if self.consensus is not None and not self.consensus.before_step(oracle):
                    self.last_step = self._landscape.passed_over()
                    return self.last_step.loss
                self.last_step = self._landscape.take(oracle, oracle.samples)
                if self.consensus is not None:
                    self.consensus.after_step(self.last_step.samples, skipped=self.last_step.skipped)
        finally:
            self._inside = False
        return self.last_step.loss

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """What is raised inside ends this replica, and other replicas need not wait for it."""
        try:
            yield
        except Exception:
            if self.consensus is not None:
                self.consensus.leave()
            raise

    def evaluate(self, rounds: Iterable[Sequence[Any]], see: Callable[[Tensor, Any], object] | None = None) -> float:
        """The mean loss over all ranks' micro-batches of all rounds, in eval mode, without gradients.

        `rounds` yields lists of micro-batches as `train_batch` takes them, equally many lists on every rank; one is in
        memory at a time. `see(logits, batch)` is called with each of this rank's micro-batches, in their order; it
        needs a loss in two steps (`lso.Loss`), else UserError.
        """
        self._inside = True
        total = weight = 0.0
        try:
            with eval_mode(self.module), self._landscape.informing():
                for microbatches in rounds:
                    oracle = self.oracle(microbatches)
                    total += (oracle.loss() if see is None else self._seen_loss(oracle, see)) * oracle.weight
                    weight += oracle.weight
        finally:
            self._inside = False
        return total / weight

    def _seen_loss(self, oracle: MicroBatchOracle, see: Callable[[Tensor, Any], object]) -> float:
        def criterion(logits: Tensor, batch: Any) -> Tensor:
            see(logits, batch)
            return self.loss.criterion(logits, batch)  # type: ignore[union-attr]  # mean_over_logits refuses others

        return oracle.mean_over_logits(criterion)

    def averaged(self, name: str = "ema") -> AbstractContextManager[Vector]:
        """Weights at the average of that name inside the block, back bit for bit after it (collective).

        Raises UserError where the engine keeps no such average. Memory as `space.perturbed`.
        """
        return self._landscape.averaged(name)

    def average(self, name: str = "ema") -> Vector:
        """The average of that name, live: read it, never write it. Raises UserError where the engine keeps none."""
        return self._landscape.average(name)

    @property
    def evaluates_at(self) -> str | None:
        """The average at which method or base say that the model is ("bi_lora", "schedule_free"); None: at the
        weights."""
        return self._landscape.evaluates_at

    def measured(self) -> tuple[ParameterSpace, GradientEngine]:
        """Space and backend for measures: of all trained parameters, or of all but the adversary of bi_lora."""
        return self._landscape.measured()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the method's state, and the clock. (Checkpoints for any world size: `lso.checkpoint`.)"""
        return self._landscape.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._landscape.load_state_dict(state_dict)

    def _refuse_other_parameters(self) -> None:
        for (name, p), trained in zip_longest(self.module.named_parameters(), self._trained, fillvalue=("", None)):
            if p is None or p.requires_grad != trained:
                now = "gone" if p is None else "trainable" if p.requires_grad else "frozen"
                raise UserError(
                    f"parameter {name or 'of the model'} is {now} and was not when the engine was built, which has its "
                    "place among the others fixed; build a new engine (a checkpoint carries the state over)."
                )

    def _refuse_stale_forward(self, module: nn.Module, inputs: Any) -> None:
        if not self._inside and not self.space.in_sync:
            self.space.copies.refuse_stale("a forward pass")
            raise StaleWeights("a forward pass is refused inside a step; call it after train_batch() has returned.")
