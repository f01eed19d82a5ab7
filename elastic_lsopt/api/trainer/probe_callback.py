"""A callback for Hugging Face's Trainer that measures curvature and flatness on the way.

    trainer = Trainer(model, …, callbacks=[ProbeCallback({"lambda_max": {}}, batches=batches, every_steps=100)])

Results go into the Trainer's `state.log_history` and `output_dir/metrics.jsonl`, which `elastic-lsopt report` draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.curvature.products import Mode
from elastic_lsopt.oracle.losses.default_loss import as_loss
from elastic_lsopt.oracle.losses.loss import Loss, LossFunction
from elastic_lsopt.oracle.step_report import log
from elastic_lsopt.probes.catalogue import ProbeContext, measure
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


class ProbeCallback(TrainerCallback):
    """Measures by name with their settings, on `batches` (this rank's, always the same), each `every_steps` steps.

    `loss_fn` as for `lso.attach`. Raises UserError for an unknown measure, no batch, every_steps < 1. The gradients of
    a step are done with when it measures; it leaves weights, gradients (None) and the model's mode as they were.
    On several ranks their batches are measured together; where a measure looks at one batch after the other, the first
    of all ranks are one. That takes a LandscapeTrainer (with method none, too), which knows how the model is wrapped:
    the stock Trainer hides DistributedDataParallel and DeepSpeed's engine from callbacks, so there it is refused.
    """

    def __init__(
        self,
        measures: Mapping[str, Mapping[str, Any]],
        *,
        batches: Sequence[Any],
        every_steps: int,
        loss_fn: Loss | LossFunction | None = None,
        products: Mode = "auto",
    ) -> None:
        if every_steps < 1:
            raise UserError(f"every_steps={every_steps} must be >= 1.")
        if not batches:
            raise UserError("batches is empty; give one or more.")
        for name, settings in measures.items():
            measure(name, settings, ("learning_rate", "initial"))
        self.measures, self.batches, self.every_steps = measures, list(batches), every_steps
        self.loss_fn = loss_fn
        self.products: Mode = products
        self.results: list[dict[str, Any]] = []
        self._mode: Mode | None = None
        """What the first checks have settled."""
        self.placed: LandscapeStep | None = None
        """Where a LandscapeTrainer has found the model, wrapped as it is; None in another Trainer."""
        self._initial: Sequence[Tensor] | None = None
        """The weights at the start; None where no measure asks for them, or a run goes on whose start nobody knows."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer before the first step, and after it has loaded a checkpoint to go on from."""
        if self.placed is None and args.world_size > 1 and not hasattr(more["model"], "reshard"):
            raise Unsupported(
                f"ProbeCallback on {args.world_size} ranks of the stock Trainer, which hides from callbacks how it has "
                'wrapped the model; use lso.LandscapeTrainer (landscape="none" takes the same steps).'
            )
        if state.global_step == 0 and any(measure(name, {}).needs == "initial" for name in self.measures):
            space = self.placed.space if self.placed is not None else ParameterSpace(backend_for(more["model"]))
            self._initial = space.weights.clone().tensors

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer after an optimizer step."""
        if state.global_step % self.every_steps:
            return
        model: nn.Module = more["model"]
        base = more.get("optimizer")
        base = getattr(base, "optimizer", base)  # out of Accelerate's wrapper
        if self.placed is not None:
            base = self.placed.backend.base  # out of DeepSpeed's, too
        group = base.param_groups[0] if base is not None else {}
        found = self._measured(model, base, state.global_step)
        for p in model.parameters():
            p.grad = None
        if self.placed is not None:
            self.placed.backend.begin(last=True)  # as the Trainer's own loop expects DistributedDataParallel to be
        samples = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        row = {"step": state.global_step, "samples": samples, "lr": group.get("lr"), "probes": found}
        self.results.append(row)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with (Path(args.output_dir) / "metrics.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        state.log_history.append({"step": state.global_step, **dict(_numbers(found))})

    def _measured(self, model: nn.Module, base: Any, step: int) -> dict[str, Any]:
        backend = self.placed.backend if self.placed is not None else backend_for(model, base)
        space = self.placed.space if self.placed is not None else ParameterSpace(backend)
        group: Mapping[str, Any] = base.param_groups[0] if base is not None else {}
        assert backend.module is not None
        loss, clock = as_loss(self.loss_fn, backend.module), SampleClock(steps=step)
        measuring = Measurement(space, backend, loss, products=self._mode or self.products)
        together = measuring.oracle(self.batches, clock, checked=self._mode is None)
        adam = (tuple(group["betas"]), group["eps"], step) if "betas" in group else None

        context = ProbeContext(
            space=space, oracle=together, samples=together.samples, learning_rate=group.get("lr"),
            momentum=group.get("momentum", 0.0), adam=adam,  # type: ignore[arg-type]
            initial=None if self._initial is None else Vector(space, self._initial),
            batches=lambda: [measuring.oracle([batch], clock, checked=False) for batch in self.batches],
        )  # fmt: skip
        found = {}
        for name, settings in self.measures.items():
            with measuring.at_rest():
                answer = measuring.take(name, settings, context)
            if answer.reason is not None:
                log.warning("measure %s gave nothing after step %d: %s", name, step, answer.reason)
            elif together.made_products:
                self._mode = together.mode
            found[name] = answer.told
        measuring.done_with(together)
        return found


def _numbers(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, result in found.items():
        for key in ("value", "standard_error"):
            if isinstance(result, dict) and isinstance(result.get(key), float):
                yield f"probes/{name}/{key}", result[key]
        for i, value in enumerate((result or {}).get("eigenvalues", [])):
            yield f"probes/{name}/{i}", value
