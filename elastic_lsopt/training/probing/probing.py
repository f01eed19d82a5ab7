"""Probes during training: measured between two steps, on fixed batches, within a budget of time.

[Note: one clock for all ranks] Whether a probe's time is used up is a matter of seconds, which no two ranks agree on,
and a measurement is collective. So rank 0's clock decides, in one small sum over the ranks at each point that is due.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.api.eval_mode import eval_mode
from elastic_lsopt.config.probes import TRAJECTORY, ProbeConfig, read_probes
from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.curvature.products import Mode
from elastic_lsopt.oracle.loss import Loss, Unsplit
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.probes.catalogue import MEASURES, ProbeContext, as_json, measure
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.trajectory.trajectory import Motion, Trajectory
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.training.engines import as_weights_are
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

    A measure that cannot be taken (UserError, NonFinite) says so once in the log, is null in the metrics, and ends
    nothing. A kernel's own RuntimeError is not told from a dead peer's, and ends the step as one would.
    """

    def __init__(self, config: TrainConfig, engine: Engine, data: Data, world: World, loss: Loss | Unsplit) -> None:
        self.probes = check_probes(config.probes)
        self._config, self._engine, self._data, self._world, self._loss = config, engine, data, world, loss
        self._began, self._spent = time.monotonic(), dict.fromkeys(self.probes, 0.0)
        self._warned: set[str] = set()
        self._settled: dict[str, Mode] = {}
        # Before a checkpoint or a peer's memory fills the engine: what the settings build, at any world size, is where
        # this training began, also in a process that comes later.
        self._initial = engine.space.weights.clone() if any(map(self._from_start, self.probes)) else None
        self._trajectory: Trajectory | None = None
        for probe in self.probes.values():
            if probe.measure == TRAJECTORY:
                window = probe.settings.get("window", WINDOW)
                self._trajectory = Trajectory(engine.space, samples=engine.clock.samples, window=window, device="cpu")

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
                with eval_mode(self._engine.module):
                    out[name] = self._measured(name, probe)
                self._spent[name] += time.monotonic() - begin
        return out

    def _affordable(self, name: str, probe: ProbeConfig) -> bool:
        """See [Note: one clock for all ranks]."""
        over = self._spent[name] > probe.budget * (time.monotonic() - self._began)
        vote = torch.tensor([float(over and self._world.is_first)], dtype=torch.float64, device=self._world.device)
        left_out = self._engine.backend.sum_world_(vote).item() > 0
        if left_out and name not in self._warned:
            self._warned.add(name)
            self._say(f"probe {name} takes more than {probe.budget:.0%} of the time: it is measured less often.")
        return not left_out

    def _measured(self, name: str, probe: ProbeConfig) -> Any:
        engine = self._engine
        try:
            if self._trajectory is not None and probe.measure == TRAJECTORY:
                return as_json(self._observed(self._trajectory, name, probe))
            situation = self._situation(name, probe)
            try:
                return as_json(measure(probe.measure or name, probe.settings).ask(situation, **probe.settings))
            finally:
                self._close(name, situation.oracle)
        except (UserError, NonFinite) as error:  # decided by sums over all ranks, so all ranks are here
            if not engine.space.in_sync:
                engine.space.resync()
            if name not in self._warned:
                self._warned.add(name)
                self._say(f"probe {name} gave nothing after step {engine.clock.steps}: {error}")
            return None
        finally:
            engine.space.end_borrowed()
            engine.backend.clear_gradient()

    def _observed(self, trajectory: Trajectory, name: str, probe: ProbeConfig) -> Motion:
        """The motion since the last time; with `align`, beside the sharpest directions where the weights are now."""
        k = probe.settings.get("align", 0)
        if not k:
            return trajectory.observe(self._engine.clock)
        situation = self._situation(name, probe)
        space, oracle = situation.space, situation.oracle
        try:
            top = lanczos(space, oracle, k=k, vectors=True).vectors
            gradient = oracle.gradient().clone()
        finally:
            self._close(name, oracle)
        return trajectory.observe(self._engine.clock, gradient=gradient, eigenvectors=top)

    def _close(self, name: str, oracle: MicroBatchOracle) -> None:
        """Free the graph; keep what the checks have settled, for they run once a probe."""
        if oracle.made_products:
            self._settled[name] = oracle.mode
        oracle.close_products()

    def _situation(self, name: str, probe: ProbeConfig) -> ProbeContext:
        engine, config = self._engine, self._config
        units, single = fixed_microbatches(self._data, config, self._world, probe.units)
        group: dict[str, Any] = next(iter(engine.param_groups), {})
        adam = None
        if config.optim != "sgd":
            adam = ((config.adam_beta1, config.adam_beta2), config.adam_epsilon, max(engine.clock.steps, 1))
        return ProbeContext(
            space=engine.space,
            oracle=self._oracle(units, name, probe, checked=name not in self._settled),
            batches=lambda: [self._oracle(single(i), name, probe, checked=False) for i in range(probe.units)],
            samples=len(self._data.train), learning_rate=group.get("lr"), momentum=config.momentum, adam=adam,
            initial=self._initial,
            window=self._trajectory.window if self._trajectory is not None else None,
        )  # fmt: skip

    def _oracle(self, units: Sequence[MicroBatch], name: str, probe: ProbeConfig, *, checked: bool) -> MicroBatchOracle:
        engine = self._engine
        return MicroBatchOracle(
            engine.space,
            engine.backend,
            self._loss,
            units,
            engine.clock,
            products=self._settled.get(name, probe.products),
            checked=checked,
        )

    def _say(self, line: str) -> None:
        if self._world.is_first:
            log.warning("%s", line)


def fixed_microbatches(
    data: Data, config: TrainConfig, world: World, count: int
) -> tuple[list[MicroBatch], Callable[[int], list[MicroBatch]]]:
    """This rank's units of `count` in all, and the i-th of them as a batch of its own (which rank 0 runs).

    The same training samples, drawn by the seed, at any world size. Raises UserError where there are fewer samples.
    """
    size = config.per_device_train_batch_size
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
