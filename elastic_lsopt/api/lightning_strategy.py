"""Landscape-aware steps on DeepSpeed inside Lightning's automatic optimisation: the strategy owns engine and step.

    strategy = lso.LandscapeDeepSpeedStrategy("zero3.json", lso.SAM(rho=0.05))
    lightning.Trainer(strategy=strategy, accumulate_grad_batches=4, gradient_clip_val=1.0, enable_checkpointing=False)

[Note: why not Lightning's own] Its DeepSpeedStrategy runs the closure once and lets DeepSpeed's engine step, so no
second pass can be; it keeps the earlier micro-batches of an update nowhere; and it starts on GPUs only. Here a
micro-batch waits, unrun, until the last of its update is due, and each pass of the method runs Lightning's own
`training_step` on all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from elastic_lsopt.api.initialize import Json, clipping
from elastic_lsopt.api.refusals import refuse_halves
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.api.trainer.refusals import refuse_method, refuse_update
from elastic_lsopt.api.trainer.trainer_oracle import TrainerOracle
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.config.deepspeed_json import engine_json, read_deepspeed_json
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.oracle.step_report import StepReport

PRECISIONS = ("32-true", "bf16-true")
ENVIRONMENT = {"RANK": "global_rank", "WORLD_SIZE": "world_size", "LOCAL_RANK": "local_rank"}


class LandscapeDeepSpeedStrategy(DDPStrategy):
    """For `lightning.Trainer(strategy=…)`: DeepSpeed, stages 0 to 3, with `method`; CPUs are no hindrance.

    `config` is a DeepSpeed JSON (a path or a dict) without batch sizes and optimizer: the one of `configure_optimizers`
    is the base. `accumulate_grad_batches`, `gradient_clip_val` and schedulers are the Trainer's. `landscape` is what
    `lso.save` and `lso.load` take; `last_step` tells what the last step was. The loss that `on_train_batch_end` gets
    is 0 for a micro-batch that waits, and that of the last pass for the one that steps; what `training_step` logs is of
    the weights themselves. `seed` is that of the method's noise and of dropout. Cost: the method's passes.
    Raises UserError and Unsupported for fp16 and other precisions than 32-true and bf16-true, manual optimisation,
    Lightning's own checkpoints, clipping by value, several optimizers, and what `lso.initialize` refuses.
    """

    strategy_name = "landscape_deepspeed"

    def __init__(self, config: str | Path | Json, method: Method, *, seed: int = 0, **more: Any) -> None:
        if find_spec("deepspeed") is None:
            raise UserError(
                "LandscapeDeepSpeedStrategy needs DeepSpeed, which is not installed: pip install deepspeed."
            )
        if isinstance(method, type) or not callable(getattr(method, "gradient", None)):
            raise UserError(f"method={method!r} is no method; give one, such as lso.SAM(rho=0.05).")
        refuse_method(method, "Lightning")
        if getattr(method, "needs_logits", False):
            raise UserError(
                f"{type(method).__name__} needs the logits, and Lightning's training_step gives the loss alone; use "
                "`elastic-lsopt train`, lso.Engine.of or lso.initialize."
            )
        super().__init__(**more)
        refuse_halves(method)
        self._config, self._method, self._seed = read_deepspeed_json(config), method, seed
        if "optimizer" in self._config:
            raise UserError("the DeepSpeed JSON has an optimizer; return it from configure_optimizers, and remove it.")
        self.landscape: LandscapeStep | None = None
        self.last_step: StepReport | None = None
        self._waiting: list[tuple[Any, ...]] = []
        """Arguments of the `training_step`s of this update that are still to run."""
        self._stepping = False

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Called when the Trainer is made."""
        precision = "32-true" if precision_plugin is None else str(precision_plugin.precision)
        if precision.startswith("16"):
            raise UserError(
                "fp16 needs loss scaling, which is refused: one scale cannot serve two passes; use bf16-true."
            )
        if precision not in PRECISIONS:
            raise Unsupported(f"precision={precision} is not tested with DeepSpeed; use {' or '.join(PRECISIONS)}.")
        self._precision_plugin = precision_plugin

    # -- the engine --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Build DeepSpeed's engine around the LightningModule (collective)."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            if self.landscape is None:
                self.model_to_device()
            else:
                self.model = self.landscape.backend.forward  # the engine, whose shards the module has now
            return
        self._refuse(trainer, self.lightning_module)
        self.precision_plugin.convert_module(self.lightning_module)
        self.setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise UserError(f"configure_optimizers gave {len(self.optimizers)} optimizers; DeepSpeed steps one.")
        refuse_update(self.optimizers[0], "Lightning")
        backend: Any = self._engine(trainer, self.optimizers[0])
        self.model = backend.engine
        self.optimizers = [backend.engine.optimizer]
        steps, each = trainer.estimated_stepping_batches, trainer.accumulate_grad_batches * self.world_size
        clock = SampleClock(total_samples=int(steps) * each if math.isfinite(steps) else None)  # in micro-batches
        LandscapeStep.refuse_unknown_length(self._method, (), clock)
        self.landscape = LandscapeStep(backend, self._method, self._seed, clock)

    def _engine(self, trainer: Trainer, base: torch.optim.Optimizer) -> Backend:
        from elastic_lsopt.backends.zero.start import start_distributed, start_engine

        # By which DeepSpeed finds its device; not every launcher of Lightning's sets them.
        os.environ |= {n: str(getattr(self, of)) for n, of in ENVIRONMENT.items()}
        limit = clipping(self._config.get("gradient_clipping"), trainer.gradient_clip_val or None)
        bf16 = self.precision_plugin.precision == "bf16-true"
        given = engine_json(self._config, world=start_distributed(), max_grad_norm=limit, bf16=bf16)
        return start_engine(self.lightning_module, lambda parameters: base, given)  # type: ignore[arg-type]

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if self.landscape is not None:
            raise Unsupported(
                "a second fit with the same strategy is not tested; make a new Trainer, strategy and module."
            )
        if not module.automatic_optimization:
            raise Unsupported(
                "automatic_optimization=False runs backward itself, once; leave it True, or use lso.initialize."
            )
        for hook in ("backward", "configure_gradient_clipping"):
            if is_overridden(hook, module):
                raise Unsupported(f"{type(module).__name__}.{hook} would not be called: DeepSpeed does it; remove it.")
        if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise Unsupported("DeepSpeed clips by norm; set gradient_clip_algorithm='norm'.")
        if self._layer_sync:
            raise Unsupported("sync_batchnorm is not tested with DeepSpeed; set it to False.")
        if trainer.checkpoint_callbacks:
            raise Unsupported(
                "Lightning's checkpoints hold whole weights, which no rank has; set enable_checkpointing=False, and "
                "call lso.save(strategy.landscape, folder) on all ranks."
            )
        if self._method.parts > trainer.accumulate_grad_batches:
            raise UserError(
                f"{type(self._method).__name__} cuts an update into parts={self._method.parts}, and there are "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} micro-batches; set it to "
                f"{self._method.parts} or more."
            )

    # -- the step ----------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **named: Any) -> Any:
        """The user's; a micro-batch that is not its update's last waits, with a loss of 0."""
        if self._accumulates:
            self._waiting.append(args)
            return torch.zeros((), device=self.root_device)
        return super().training_step(*args, **named)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **named: Any) -> Tensor:
        if self._accumulates:
            return closure_loss
        assert self.landscape is not None and self.lightning_module is not None
        loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.landscape.backend.backward(loss)
        return self.precision_plugin.post_backward(loss, self.lightning_module)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's for the micro-batches that wait: they run no backward."""
        yield

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **named: Any
    ) -> StepReport | None:
        """Run the method's passes over the update's micro-batches and let DeepSpeed step (collective)."""
        assert self.landscape is not None and self.lightning_module is not None
        trainer, waiting = self.lightning_module.trainer, self._waiting
        self._waiting, self._stepping = [], True
        runs = [*(lambda args=args: self._run_again(trainer, args, optimizer) for args in waiting), closure]
        oracle = TrainerOracle(
            self.landscape.space,
            self.landscape.backend,
            self.landscape.clock,
            _loss_of,
            runs,
            lambda: _not_logged(trainer),
        )
        call._call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)
        try:
            with self.landscape.informing():
                self.last_step = self.landscape.take(oracle, len(runs) * self.world_size)
        finally:
            self._stepping = False
        return self.last_step

    def _run_again(self, trainer: Trainer, args: tuple[Any, ...], optimizer: Any) -> Tensor:
        """Forward and backward of a micro-batch that has waited, as Lightning's own closure runs them."""
        output = call._call_strategy_hook(trainer, "training_step", *args)
        result = ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)
        if result.closure_loss is None:
            raise UserError("training_step returned None; DeepSpeed cannot leave out a micro-batch: return a loss.")
        call._call_strategy_hook(trainer, "backward", result.closure_loss, optimizer)
        assert result.loss is not None
        return result.loss

    @property
    def _accumulates(self) -> bool:
        """Whether Lightning asks for a micro-batch of an update that is not to step yet."""
        assert self.lightning_module is not None
        return not self._stepping and self.lightning_module.trainer.fit_loop._should_accumulate()


@torch.enable_grad()
def _loss_of(run: Callable[[], Any]) -> Tensor:
    loss = run()
    if loss is None:
        raise UserError("training_step returned None; DeepSpeed cannot leave out a micro-batch: return a loss.")
    return loss


@contextmanager
def _not_logged(trainer: Trainer) -> Iterator[None]:
    """What `training_step` logs inside is of moved weights, and dropped."""
    loop = trainer.fit_loop.epoch_loop
    own = loop._results
    loop._results = type(own)(training=True)
    loop._results.batch, loop._results.batch_size = own.batch, own.batch_size
    try:
        yield
    finally:
        loop._results = own
