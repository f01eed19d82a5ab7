"""Probes during training: measured between two steps, on fixed batches, within a budget of time.

[Note: one clock for all ranks] Whether a probe's time is used up is a matter of seconds, which no two ranks agree on,
and a measurement is collective. So rank 0's clock decides, in one small sum over the ranks at each point that is due.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.config.probes import TRAJECTORY, ProbeConfig, read_probes
from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.settings import ADAMS, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.probes.catalogue import MEASURES, ProbeContext, as_json, measure
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.operator import Matrix
from elastic_lsopt.probes.trajectory.trajectory import Motion, Trajectory
from elastic_lsopt.training.building.engines import as_weights_are, plain_loss_of
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.world import World

log = logging.getLogger("elastic_lsopt")
WINDOW = 40
"""Points of the trajectory that are kept, in host memory, for its principal components: a vector each."""

KNOWN = ("learning_rate", "initial")
"""What a job knows for its measures."""


def check_probes(block: Mapping[str, Any]) -> dict[str, ProbeConfig]:
    """The probes of a job. Raises SettingError, with the nearest name, for an unknown measure or setting."""
    probes = read_probes(block)
    for name, probe in probes.items():
        if probe.measure == TRAJECTORY:
            window, align = probe.settings.get("window", WINDOW), probe.settings.get("align", 0)
            wrong = not isinstance(window, int) or window < 3 or not isinstance(align, int) or align < 0
            if wrong or probe.settings.keys() - {"window", "align"}:
                raise SettingError(
                    f"probes.{name}", f"probes.{name}: the trajectory's settings are window (points, >= 3) and align "
                    "(eigenvectors to compare with, >= 0)."
                )  # fmt: skip
            continue
        try:
            measure(probe.measure or name, probe.settings, KNOWN)
        except UserError as error:
            raise SettingError(f"probes.{name}", f"probes.{name}: {error}") from None
    return probes


class Probing:
    """The probes of one engine (all collective). Each is measured with the model in eval mode.

    A measure that cannot be taken says so once in the log, is null in the metrics, and ends nothing.
    """

    def __init__(self, config: TrainConfig, engine: Engine, data: Data, world: World) -> None:
        self.probes = check_probes(config.probes)
        self._config, self._engine, self._data, self._world = config, engine, data, world
        self._space, backend = engine.measured()
        self._measuring = Measurement(self._space, backend, plain_loss_of(config, engine.module))
        self._began, self._spent = time.monotonic(), dict.fromkeys(self.probes, 0.0)
        self._warned: set[str] = set()
        # Before a checkpoint or a peer's memory fills the engine: what the settings build, at any world size, is where
        # this training began, also in a process that comes later.
        self._initial = self._space.weights.clone() if any(map(self._from_start, self.probes)) else None
        self._trajectory: Trajectory | None = None
        for probe in self.probes.values():
            if probe.measure == TRAJECTORY:
                window = probe.settings.get("window", WINDOW)
                self._trajectory = Trajectory(
                    self._space, samples=engine.clock.samples, window=window, device="cpu",
                    now=lambda: engine.clock.samples,
                )  # fmt: skip
                engine.add(self._trajectory)

    def _from_start(self, name: str) -> bool:
        found = MEASURES.get(self.probes[name].measure or name)
        return found is not None and found.needs == "initial"

    def after(self, before: tuple[int, int]) -> dict[str, Any]:
        """What is due after the step that began at `before` (steps, samples): results by name, ready for JSON."""
        clock = self._engine.clock
        out = {}
        for name, probe in self.probes.items():
            if probe.due(before, (clock.steps, clock.samples)) and self._affordable(name, probe):
                begin = time.monotonic()
                out[name] = self._measured(name, probe)
                self._spent[name] += time.monotonic() - begin
        return out

    def _affordable(self, name: str, probe: ProbeConfig) -> bool:
        """See [Note: one clock for all ranks]."""
        over = self._spent[name] > probe.budget * (time.monotonic() - self._began)
        vote = torch.tensor([float(over and self._world.is_first)], dtype=torch.float64, device=self._world.device)
        left_out = self._engine.backend.sum_replica_(vote).item() > 0
        if left_out and name not in self._warned:
            self._warned.add(name)
            self._say(f"probe {name} takes more than {probe.budget:.0%} of the time: it is measured less often.")
        return not left_out

    def _measured(self, name: str, probe: ProbeConfig) -> Any:
        at = self._engine.evaluates_at
        with nullcontext() if at is None else self._engine.averaged(at), self._measuring.at_rest():
            answer = self._measuring.asked(lambda: self._asked(name, probe))
        if answer.reason is not None and name not in self._warned:
            self._warned.add(name)
            self._say(f"probe {name} gave nothing after step {self._engine.clock.steps}: {answer.reason}")
        return answer.told

    def _asked(self, name: str, probe: ProbeConfig) -> Any:
        clock = self._engine.clock
        if self._trajectory is not None and probe.measure == TRAJECTORY and not probe.settings.get("align", 0):
            return self._trajectory.observe(clock)
        context = self._context(name, probe)
        try:
            if self._trajectory is not None and probe.measure == TRAJECTORY:
                return self._aligned(self._trajectory, context, probe.settings["align"])
            return self._of_measure(probe.measure or name, probe.settings, context)
        finally:
            self._measuring.done_with(context.oracle, name)

    def _of_measure(self, name: str, settings: Mapping[str, Any], context: ProbeContext) -> Any:
        """What the measure says; of eigenvectors of the loss also how the replicas' disagreement lies to them."""
        found, consensus = measure(name, settings), self._engine.consensus
        all_settings = {**found.settings, **settings}
        of_the_loss = "vectors" in all_settings and all_settings.get("of") in get_args(Matrix)
        if consensus is None or not consensus.keeps_span or not of_the_loss:
            return found.ask(context, **settings)
        told = found.ask(context, **{**settings, "vectors": True})
        beside = consensus.beside(told.vectors)
        return {**as_json(told), "disagreement": beside} if beside else told

    def _aligned(self, trajectory: Trajectory, context: ProbeContext, k: int) -> Motion:
        """The motion since the last time, beside the sharpest directions where the weights are now."""
        top = lanczos(context.space, context.oracle, k=k, vectors=True).vectors
        gradient = context.oracle.gradient().clone()
        return trajectory.observe(self._engine.clock, gradient=gradient, eigenvectors=top)

    def _context(self, name: str, probe: ProbeConfig) -> ProbeContext:
        engine, config, measuring = self._engine, self._config, self._measuring
        together, single = fixed_microbatches(self._data, config, self._world, probe.units)
        group: dict[str, Any] = next(iter(engine.param_groups), {})
        adam = None
        if config.optim in ADAMS:
            adam = ((config.adam_beta1, config.adam_beta2), config.adam_epsilon, max(engine.clock.steps, 1))

        def oracle(own: Sequence[MicroBatch], *, checked: bool) -> MicroBatchOracle:
            return measuring.oracle(own, engine.clock, purpose=name, products=probe.products, checked=checked)

        return ProbeContext(
            space=self._space, oracle=oracle(together, checked=True),
            batches=lambda: [oracle(single(i), checked=False) for i in range(probe.units)],
            samples=len(self._data.train), learning_rate=group.get("lr"), momentum=config.momentum, adam=adam,
            initial=self._initial,
            window=self._trajectory.window if self._trajectory is not None else None,
        )  # fmt: skip

    def _say(self, line: str) -> None:
        if self._world.is_first:
            log.warning("%s", line)


def fixed_microbatches(
    data: Data, config: TrainConfig, world: World, count: int, *, microbatch_samples: int | None = None
) -> tuple[list[MicroBatch], Callable[[int], list[MicroBatch]]]:
    """This rank's micro-batches of `count` in all, and the i-th of them as a batch of its own (which rank 0 runs).

    The same training samples, drawn by the seed, at any world size; in micro-batches of the job's size, or another.
    Raises UserError where there are fewer samples.
    """
    size = microbatch_samples or config.per_device_train_batch_size
    if count * size > len(data.train):
        raise UserError(
            f"units={count} of per_device_train_batch_size={size} are more than the {len(data.train)} training "
            "samples; measure on fewer."
        )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed)).tolist()

    def batch(i: int) -> dict[str, Any]:
        rows = data.collate([data.train[j] for j in order[i * size : (i + 1) * size]])
        return as_weights_are({k: v.to(world.device) for k, v in rows.items()}, config)

    together = [MicroBatch(i, batch(i)) for i in range(world.rank, count, world.size)] or [
        MicroBatch(0, batch(0), idle=True)
    ]
    return together, lambda i: [MicroBatch(0, batch(i), idle=world.rank > 0)]
