"""Landscape-aware steps inside Hugging Face's Trainer, whose loop, arguments and callbacks stay as they are.

    trainer = lso.LandscapeTrainer(model=model, args=args, train_dataset=rows, landscape=lso.SAM(rho=0.05))
    class LandscapeSFT(lso.LandscapeTrainerMixin, trl.SFTTrainer): ...

[Note: where the passes run] The loop fetches all micro-batches of an update before it runs them (`get_batch_samples`),
and calls `training_step` for each. Ours idles until the last of them, then takes the step: every pass runs the
Trainer's own `training_step` on every micro-batch. What the method makes of it is left in `.grad`, where the loop clips
it, calls its callbacks and steps the optimizer. Under DeepSpeed it lies in the engine's buffer, and the engine clips
and steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from elastic_lsopt.api.refusals import refuse_halves, refuse_unstepped
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.api.trainer.logged_counts import not_counted
from elastic_lsopt.api.trainer.probe_callback import ProbeCallback
from elastic_lsopt.api.trainer.refusals import (
    method_of,
    refuse_surprises,
    refuse_untested,
    refuse_update,
    refuse_version,
)
from elastic_lsopt.api.trainer.trainer_checkpoint import (
    has_weights,
    load_portable,
    portable_part,
    resumable,
    save_portable,
)
from elastic_lsopt.api.trainer.trainer_oracle import TrainerOracle
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.step_report import StepReport, log
from elastic_lsopt.updates.update_optimizer import updates_of

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class LandscapeTrainerMixin(_Base):
    """Put before a Trainer class: it takes `landscape`, a method, its name or {"method": name, field: value}.

    One process, DDP, FSDP2, DeepSpeed 0 to 3. `last_step` tells what the last step was. A checkpoint can be resumed at
    another world size and on another backend. With method none the Trainer's own steps run, and `last_step` stays None.
    Cost: the method's passes.
    Raises UserError and Unsupported, when it is made, for what is not tested or cannot be right: fp16, DataParallel,
    FSDP that accelerate did not give, an optimizer that steps in backward … (`refusals.py`).
    """

    def __init__(self, *args: Any, landscape: Any = None, **more: Any) -> None:
        refuse_version()
        self.landscape = method_of(landscape)
        refuse_halves(self.landscape)
        self.last_step: StepReport | None = None
        self._landscape_step: LandscapeStep | None = None
        self._placed: tuple[Any, Any] | None = None
        self._update_batches: list[Any] = []
        self._updates = False
        self._ran, self._planned_steps, self._keeps_our_checkpoints = 0, 0, True
        given = dict(zip(("model", "args"), args, strict=False)) | more
        self._own_optimizer: torch.optim.Optimizer | None = None
        with resumable(given.get("model"), given.get("args")):
            super().__init__(*args, **more)
        self._own_optimizer = self.optimizer
        refuse_update(self.optimizer, "the Trainer")
        refuse_surprises(self)
        if self._takes_steps:
            refuse_untested(self, self.landscape)

    @property
    def _takes_steps(self) -> bool:
        """Whether steps are ours: with method none they are the Trainer's, unless an update of ours takes them."""
        return self._updates or not isinstance(self.landscape, Plain)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            from elastic_lsopt.api.trainer.deepspeed_passes import count_one_micro_batch

            plugin: Any = self.accelerator.state.deepspeed_plugin
            count_one_micro_batch(plugin.hf_ds_config.config)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.is_deepspeed_enabled:
            self.optimizer = self._own_optimizer  # of `optimizers=…`, which transformers' deepspeed_init drops unsaid
        given = self.optimizer
        optimizer = super().create_optimizer(model)
        if (update := updates_of(getattr(optimizer, "optimizer", optimizer))) is not None:
            refuse_update(update, "the Trainer")
            update.steps_elsewhere, self._updates = True, True  # the loop also steps where a step was left out
        elif given is None and self._keeps_our_checkpoints:
            # The Trainer makes a group for what does not decay, also where there is nothing of it (LoRA), and DeepSpeed
            # drops it: a checkpoint would have a group more on one than on the other.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # -- the step ----------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        self._update_batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._ran = 0
        return self._update_batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The mean loss of the update at the weights before it, with its last micro-batch; 0 with those before."""
        run = super().training_step
        if not self._takes_steps:
            return run(model, inputs, num_items_in_batch)
        self._ran += 1
        nothing = torch.zeros((), device=self.args.device)  # the loop adds these up
        if self._ran < len(self._update_batches):
            return nothing
        if not self.accelerator.sync_gradients:
            log.warning(
                "the dataset ended inside of an update: its last %d micro-batches are less than "
                "gradient_accumulation_steps=%d and are left out.", self._ran, self.args.gradient_accumulation_steps,
            )  # fmt: skip
            return nothing
        step = self._landscape_step
        assert step is not None
        step.clock = self._clock
        oracle = TrainerOracle(
            step.space, step.backend, step.clock, lambda batch: run(model, copy.copy(batch), num_items_in_batch),
            self._update_batches, lambda: not_counted(self), self._shares_by_items(num_items_in_batch),
        )  # fmt: skip
        with step.informing():
            self.last_step = step.take(oracle, self._samples_per_micro_batch * len(self._update_batches))
        return torch.tensor(self.last_step.loss, device=self.args.device, dtype=torch.float32)

    def _shares_by_items(self, num_items: Any) -> Callable[[], list[float]] | None:
        """What each of this rank's micro-batches weighs in the loss of the update, which is a mean over items (tokens);
        None where the Trainer counts none, and its loss is a mean over micro-batches."""
        if num_items is None:
            return None

        def shares() -> list[float]:
            total = float(num_items) * (1 if self.args.average_tokens_across_devices else self.args.world_size)
            return [self._items_of(batch) / total if total else 0.0 for batch in self._update_batches]

        return shares

    def _items_of(self, batch: Any) -> float:
        """As the Trainer counts them, without its sum over ranks."""
        summed, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            return float(self._get_num_items_in_batch([batch], self.args.device) or 0)
        finally:
            self.args.average_tokens_across_devices = summed

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """An update of ours has clipped and stepped before (`UpdateOptimizer`), as DeepSpeed has."""
        return self._norm_of_last_step if self._stepped_before else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._norm_of_last_step if self._stepped_before else super()._get_grad_norm(model, grad_norm)

    @property
    def _stepped_before(self) -> bool:
        step = self._landscape_step
        return self._takes_steps and step is not None and (step.steps_base or updates_of(step.backend.base) is not None)

    @property
    def _norm_of_last_step(self) -> float:
        assert self.last_step is not None
        return self.last_step.gradient_norm

    @property
    def _samples_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self._train_batch_size * self.args.world_size

    @property
    def _clock(self) -> SampleClock:
        """The Trainer's own progress: its steps at full batches (right after a resume, too)."""
        each = self._samples_per_micro_batch * self.args.gradient_accumulation_steps
        return SampleClock(self.state.global_step * each, self.state.global_step, self._planned_steps * each)

    # -- the place ---------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        part = portable_part(resume_from_checkpoint)
        self._keeps_our_checkpoints = part is not None or resume_from_checkpoint is None
        made = super()._prepare_for_training(max_steps, train_dataloader, None if part else resume_from_checkpoint)
        self._planned_steps = max_steps
        self._place(self.model_wrapped)
        if part is not None:
            self._resume(part)
        elif resume_from_checkpoint is not None and self._landscape_step is not None and self._landscape_step.state:
            log.warning("%s is no LandscapeTrainer's checkpoint: the method begins anew.", resume_from_checkpoint)
        return made

    def _place(self, model: Any) -> None:
        """Find where the weights lie; what a method remembers goes on while model and optimizer are the same."""
        if self.is_deepspeed_enabled and self._takes_steps:
            from elastic_lsopt.api.trainer.deepspeed_passes import BackwardOnly

            self.accelerator.deepspeed_engine_wrapped = BackwardOnly(model)
        if self._placed is None or self._placed[0] is not model or self._placed[1] is not self.optimizer:
            self._placed = model, self.optimizer
            try:
                self._landscape_step = self._placed_on(model)
            except Unsupported:
                if self._takes_steps:
                    raise
                self._landscape_step = None  # the stock Trainer's steps and checkpoints need nothing of ours
        step = self._landscape_step
        if step is not None and not step.space.in_sync:  # an exception has ended the `train` before this one
            step.space.resync()
            step.backend.clear_gradient()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProbeCallback):
                callback.placed = step

    def _placed_on(self, model: Any) -> LandscapeStep:
        base: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper
        while (inner := getattr(model, "_modules", {}).get("_orig_mod")) is not None:  # out of torch.compile's
            model = inner
        backend = backend_for(model, base, max_grad_norm=self.args.max_grad_norm)
        if not self.is_deepspeed_enabled:
            refuse_unstepped(backend.parameters, base)
        return LandscapeStep(backend, self.landscape, self.args.seed, steps_base=self.is_deepspeed_enabled)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._landscape_step is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self._landscape_step.clock = self._clock
        schedule: Any = self.lr_scheduler
        save_portable(self._landscape_step, output_dir, schedule.state_dict())
        if self.args.should_save:
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if portable_part(resume_from_checkpoint) is None or (
            has_weights(resume_from_checkpoint) and not getattr(self, "is_distributed_loading_by_transformers", False)
        ):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _resume(self, part: Path) -> None:
        if self._landscape_step is None:
            raise UserError(f"{part} cannot be resumed here: this model, optimizer or place is not supported.")
        saved, schedule = load_portable(self._landscape_step, part), cast(Any, self.lr_scheduler)
        schedule.load_state_dict(schedule.state_dict() | saved)
        self._load_scaler(str(part.parent))  # of fp16, which method none may have

    def _load_best_model(self) -> None:
        part = portable_part(self.state.best_model_checkpoint)
        if part is None or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super()._load_best_model()
        elif self._landscape_step is not None:
            load_portable(self._landscape_step, part)


class LandscapeTrainer(LandscapeTrainerMixin, Trainer):
    """Hugging Face's Trainer with one argument more, `landscape`; see `LandscapeTrainerMixin`."""
