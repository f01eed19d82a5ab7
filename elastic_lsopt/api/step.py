"""One optimizer step, the same behind every face: the method's gradient, then the base optimizer, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.api.base_view import BaseView, refuse_lacking, refuse_maximized
from elastic_lsopt.api.refusals import refuse_halves, refuse_moved_matrices, refuse_mover, refuse_while_moved
from elastic_lsopt.api.saved_state import Laid, go_on, load, saved
from elastic_lsopt.averages.average import FAMILY as AVERAGES
from elastic_lsopt.averages.average import Average
from elastic_lsopt.backends.adapters.adversary import AdversaryAdapter
from elastic_lsopt.backends.adapters.merged_weights import MergedWeights
from elastic_lsopt.backends.adapters.restricted import restricted_space
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.errors import NonFinite, PeerFailed, UserError
from elastic_lsopt.optimizers.registry import methods
from elastic_lsopt.optimizers.scheduled import refuse_unknown_length
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.family import Family, Kept, MethodFamily, Stateful
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.method import Method, State
from elastic_lsopt.oracle.observation import HowProducts
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import FAITHFUL, Piggyback, StepReport, log, warn_unfaithful
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import plain_name
from elastic_lsopt.space.perturbation import Fidelity
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.space.vector import BorrowedGradient, Vector
from elastic_lsopt.updates.update_optimizer import updates_of


@dataclass
class LandscapeStep:
    """A method on a backend: its space, its clock, and the families of state that survive a step."""

    backend: Backend
    method: Method
    seed: int = 0
    clock: SampleClock = field(default_factory=SampleClock)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    kept: Sequence[Stateful] = ()
    """What is remembered beside the method's own state: averages, the gain …"""
    steps_base: bool = True
    """False: who holds the base optimizer clips and steps it himself, with the gradient that is in `.grad` then."""

    of_job: Callable[[int], int] | None = None
    """What the job's clock makes of a step's samples where other replicas go their own way; None: they are all."""

    deals: bool = False
    """Who holds this takes whole micro-batches, which may be dealt to both halves of the ranks."""

    def __post_init__(self) -> None:
        self.backend.refuse_base()
        refuse_maximized(self.method, self.backend.param_groups, updates_of(self.backend.base))
        if getattr(self.method, "halves", False):
            if not self.deals:
                refuse_halves(self.method)
            self.backend.form_halves()
        self.space = ParameterSpace(self.backend, self.seed)
        if getattr(self.method, "moves_merged", False):
            self.space.merged = MergedWeights(self.backend)
        if getattr(self.method, "moves_adversary", False):
            self.space.adversary = AdversaryAdapter(self.backend)
        self.families: dict[str, Family] = {}
        for kind in (MethodFamily(self.method), *self.kept):
            self.add(Kept(kind, self.space))
        self._base = BaseView(self.backend, self.space)
        refuse_lacking(self.method, self.backend.base)
        self._update = updates_of(self.backend.base)
        refuse_mover(self.method, self._update, steps_base=self.steps_base)
        for family in self._update.bind(self.space, self.backend.parameters) if self._update is not None else ():
            self.add(family)
        self._products = HowProducts()
        self._warned = self._looked = False
        self._said: set[str] = set()
        """Averages that were asked for before they had begun."""

    @staticmethod
    def refuse_unknown_length(method: Method, kept: Sequence[Stateful], clock: SampleClock) -> None:
        """Raise UserError for a method or an average that asks how far the run is, where its length is not known."""
        refuse_unknown_length(method, clock)
        for kind in kept:
            if isinstance(kind, Average):
                kind.first(clock)

    def average(self, name: str) -> Vector:
        """The average of that name, live: read it, never write it. Raises UserError where none is kept.

        Of a method that evaluates elsewhere than at the weights (bi_lora) the average is taken there, as a Vector of
        its own; under the method's own name that of the weights themselves.
        """
        point = getattr(self.method, "point", None)
        if point is None:
            return self._average(name)
        return point(self.space, self.space.weights if name == self._point_of_method else self._average(name))

    @property
    def _point_of_method(self) -> str | None:
        """The method's name, where it evaluates elsewhere than at the weights."""
        return methods.name_of(type(self.method)) if hasattr(self.method, "point") else None

    def _average(self, name: str) -> Vector:
        kept = self.families.get(f"{AVERAGES}{name}")
        if kept is None and self._update is not None and name in self._update.points():
            return self._update.point(name, self.space)
        if not isinstance(kept, Kept) or not isinstance(kept.kind, Average):
            known = [n.removeprefix(AVERAGES) for n in self.families if n.startswith(AVERAGES)]
            known += self._update.points() if self._update is not None else []
            known += [self._point_of_method] if self._point_of_method is not None else []
            raise UserError(
                f"no average {name!r} is kept (there are: {', '.join(known) or 'none'}); build with "
                f"keep=[lso.averages.build({name!r})], in a YAML with averages: {{{name}: {{…}}}}."
            )
        if not kept.kind.begun(kept.state) and name not in self._said:
            self._said.add(name)
            log.warning("average %s has taken no weights yet: until then it is the weights themselves.", name)
        return kept.kind.weights(self.space, kept.state)

    @property
    def evaluates_at(self) -> str | None:
        """The average at which the method or the base optimizer says that the model is (bi_lora's, schedule_free's);
        None: at the weights."""
        if self._point_of_method is not None:
            return self._point_of_method
        return next(iter(self._update.points()), None) if self._update is not None else None

    def measured(self) -> tuple[ParameterSpace, GradientEngine]:
        """The trained parameters of the model that is wanted, for measures: all of them, or all but an adversary's."""
        adversary = self.space.adversary
        if adversary is None:
            return self.space, self.backend
        chosen = [i for i, is_factor in enumerate(adversary.factors) if not is_factor]
        return restricted_space(self.space, self.backend, chosen)

    @contextmanager
    def averaged(self, name: str) -> Iterator[Vector]:
        """Weights at the average of that name inside the block, back bit for bit after it (collective)."""
        point = self.average(name)
        with self.space.at(point):
            yield point

    @property
    def state(self) -> State:
        """What the method remembers."""
        return self.families["method"].state_dict()

    def add(self, family: Family) -> None:
        """From now on this survives too. Raises UserError for a name that is taken."""
        if family.name in self.families:
            raise UserError(f"there are two families of state named {family.name!r}; give one another name.")
        self.families[family.name] = family

    def take(self, oracle: Oracle, samples: int) -> StepReport:
        """Ask the method for its gradient, step the base, advance the clock by `samples` (collective).

        A non-finite loss or gradient in any pass makes all ranks skip the step together: counted and logged, its
        samples are committed. Any other exception leaves this rank's weights as they were; call it `informing()`.
        Raises StaleWeights inside `averaged`, `perturbed` or `at`, whose end would take the step back.
        """
        refuse_while_moved(self.space, "a step is refused")
        oracle.moves_buffers = True
        report = self._take(oracle, samples)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        if self.backend.groups.job.size > self.backend.groups.replica.size:
            report, samples = self._of_the_job(report)
        elif self.of_job is not None:
            samples = self.of_job(samples)
        self.clock = self.clock.advanced(samples)
        report = replace(report, clock=self.clock)
        if not report.skipped:
            for kept in self._watching():
                kept.kind.after_step(self.space, report, kept.state)
        return report

    def passed_over(self) -> StepReport:
        """A step that is not taken, because its samples are not this replica's any more: nothing changes."""
        return StepReport(math.nan, 0.0, math.nan, 0, True, clock=self.clock)

    def begin_anew(self) -> None:
        """From the weights as they are, as if no step had been taken: momenta and all that families remember."""
        for state in self.backend.base.state.values() if self.backend.base is not None else ():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        for family in self.families.values():
            family.begin()

    def _of_the_job(self, report: StepReport) -> tuple[StepReport, int]:
        """The report with what all replicas have to say, and the samples that all of them have used.

        One all-reduce per step. A pass has summed them over its replica, whose first rank speaks for it.
        """
        riding = report.piggyback.numbers if report.piggyback is not None else []
        speaks = float(self.backend.rank == 0)
        own = [speaks * value for value in (report.samples, report.stop, *riding)]
        used, stop, *rode = self.backend.sum_job_(on_device(own, self.backend.compute_device)).tolist()
        return replace(report, stop=stop > 0, piggyback=Piggyback.of(rode) if rode else None), int(used)

    def _watching(self) -> list[Kept]:
        return [family for family in self.families.values() if isinstance(family, Kept)]

    def onto(self, backend: Backend) -> LandscapeStep:
        """This step on other trainable parameters (some were frozen, unfrozen or added): method, clock and state.

        A Vector of the method keeps its elements; those of a new parameter are what `init` makes them, or 0. This one's
        space is retired.
        """
        new = LandscapeStep(
            backend, self.method, self.seed, self.clock, self.skipped_steps, kept=self.kept, steps_base=self.steps_base,
            deals=self.deals,
        )  # fmt: skip
        new._warned, new._looked = self._warned, self._looked
        for name, family in self.families.items():
            if (mine := new.families.get(name)) is None:
                continue  # all of an update's parameters were frozen
            refuse_moved_matrices(family, mine, backend.world)
            values = family.state_dict()
            vectors = {key: value for key, value in values.items() if isinstance(value, Vector)}
            layouts = {"": family.space.layout, **{key: value.space.layout for key, value in vectors.items()}}
            go_on(
                mine,
                {**values, **{key: list(value.tensors) for key, value in vectors.items()}},
                {key: Laid.of(layout) for key, layout in layouts.items()},
            )
        self.space.retire()
        return new

    @contextmanager
    def informing(self) -> Iterator[None]:
        """What is raised inside is told to the other ranks: they may wait for this one in a collective."""
        try:
            yield
        except Exception as error:
            told = self._tell(error)
            if told is error:
                raise
            raise told from error

    def _take(self, oracle: Oracle, samples: int) -> StepReport:
        space = self.space
        space.copies.refuse_stale("a step")
        refuse_maximized(self.method, self.backend.param_groups, self._update)  # an entry may have changed since
        space.fidelity.last = None
        oracle.base = self._base
        # Rounding can spoil a perturbation where the forward is narrower than fp32: look once, on the first step, or on
        # the second where the first moved only before any forward, which tells its type.
        space.fidelity.narrow = self.clock.steps < 2 and not self._looked
        try:
            if self._update is not None:
                passes = getattr(self.method, "passes_at", lambda step: 1)(oracle.step)
                oracle.observations = self._update.observations(oracle.step, passes, self._products)
            with space.copies.deferring():
                gradient = self._of_the_method(oracle)
                for kept in self._watching():
                    gradient = kept.kind.pulled(space, gradient, kept.state)
                gradient = oracle.install(gradient)
                norm = space.norm(gradient)
                if not math.isfinite(norm):
                    raise NonFinite(f"step {oracle.step}: the norm of the method's gradient is {norm}")
                for kept in self._watching():
                    kept.kind.before_step(space, gradient, samples, kept.state)
                move = getattr(self.method, "move", None)
                too_large = norm**2 > torch.finfo(torch.float32).max  # DeepSpeed would leave out its part of the step
                if too_large and (move is not None or self._update is not None):
                    raise NonFinite(f"step {oracle.step}: the norm of the method's gradient is {norm}")
                if move is not None:
                    move(space, gradient, self._base, self.clock, self.state)
                for kept in self._watching():
                    kept.kind.move(space, kept.state)
                if self._update is not None:
                    self._update.take(self._clipped(gradient, norm), self.backend.unmoved())
                if self.steps_base:
                    self.backend.step(gradient, norm)
                settle = getattr(self.method, "settle", None)
                if settle is not None and settle(space, self.state):
                    space.copies.refresh()
                space.stepped()
        except NonFinite as error:
            return self._skip(oracle, samples, error)
        finally:
            for key in [key for key in self.state if key.startswith("_")]:  # of this step alone
                del self.state[key]
            space.fidelity.narrow = False
            self._looked = self._looked or space.fidelity.last is not None
        return StepReport(
            oracle.first_loss,
            oracle.passes + oracle.observed,
            norm,
            samples,
            False,
            oracle.stop,
            oracle.piggyback,
            oracle.samples_per_second,
            self._faithful(space.fidelity.last),
        )

    def _of_the_method(self, oracle: Oracle) -> Vector:
        gradient: object = self.method.gradient(self.space, oracle, self.state)
        if not isinstance(gradient, Vector):
            raise UserError(
                f"{type(self.method).__name__}.gradient returned a {type(gradient).__name__}; it must return a Vector."
            )
        return gradient

    def _clipped(self, gradient: Vector, norm: float) -> Vector:
        """The gradient that an update of ours may overwrite, in the precision of Vectors."""
        borrowed = isinstance(gradient, BorrowedGradient) and all(t.dtype == self.space.dtype for t in gradient.tensors)
        own = gradient if borrowed else gradient.clone()
        limit = self.backend.max_grad_norm
        return own.mul_(limit / (norm + 1e-6)) if limit and norm > limit else own

    def _skip(self, oracle: Oracle, samples: int, error: NonFinite) -> StepReport:
        self.space.resync()
        self.space.end_borrowed()
        self.backend.clear_gradient()
        self.skipped_steps += 1
        log.warning("skipped a step on all ranks (%d so far): %s", self.skipped_steps, error)
        passes = oracle.passes + oracle.observed
        return StepReport(oracle.first_loss, passes, math.nan, samples, True, oracle.stop, oracle.piggyback)

    def _faithful(self, fidelity: Fidelity | None) -> Fidelity | None:
        if fidelity is not None and fidelity.cosine < FAITHFUL and not self._warned:
            self._warned = True
            warn_unfaithful(fidelity, self.backend.compute_dtype)
        return fidelity

    def _tell(self, error: Exception) -> Exception:
        self.backend.report_failure(error)
        first = self.backend.transport.first_failure()
        if first is not None and not isinstance(error, PeerFailed) and isinstance(error, RuntimeError):
            return PeerFailed(f"{first}; this rank's own weights are as they were before the pass.")
        return error

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All families (this rank's pieces of each Vector, by the names of parameters) and the clock."""
        return {
            **saved(self.families),
            "clock": (self.clock.samples, self.clock.steps),
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any], known: Collection[str] | None = None) -> None:
        """Go on from what `state_dict` gave, by name: a parameter of which nothing was saved begins anew.

        `known` are the names of all parameters, trained or not (None: the module's). Raises UserError for what cannot
        be of these parameters; see `saved_state.load`.
        """
        if known is None:
            module = self.backend.module
            known = [plain_name(n) for n, _ in module.named_parameters()] if module is not None else []
        load(self.families, state_dict, known)
        samples, steps = state_dict["clock"]
        self.clock = SampleClock(samples, steps, self.clock.total_samples)
        self.skipped_steps = state_dict["skipped_steps"]
