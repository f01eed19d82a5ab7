"""The plan's hyper-parameters, into the base optimizer's param groups, before each step."""

from __future__ import annotations

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.plan import Plan
from elastic_lsopt.schedules.adascale import GAIN, measured
from elastic_lsopt.schedules.batch_scaling import Hyperparameters, permits


class Rates:
    """Each group's own hyper-parameters, as it had them when it was built, times what the plan says.

    Groups may differ (biases without weight decay): each is scaled for itself. Under the rule adascale the rate follows
    the gain as it is measured, step by step. Raises Unsupported where adascale has nothing that measures it.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        batch = plan.reference.global_batch_size
        self._own = [Hyperparameters.of_group(group, batch) for group in engine.param_groups]
        for i, own in enumerate(self._own):
            if not permits(own, plan.global_batch_size, plan.rule):
                raise Unsupported(
                    f"param group {i}: the rule sqrt cannot take betas={own.betas} from a batch of {batch} to "
                    f"{plan.global_batch_size}; say them in the file (optim_args: {{betas: …}}), so that the batch is "
                    "held, or set elastic.max_global_batch_size."
                )
        if plan.rule == "adascale" and GAIN not in engine.families:
            raise Unsupported(
                "lr_rule=adascale needs a measured gain: give the engine "
                "keep=[GainMonitor(horizon_samples=…)] of elastic_lsopt.schedules.adascale."
            )

    def set(self, share: float) -> float:
        """For the step that begins now; `share` of the peak rate is the schedule's. Returns the first group's rate."""
        engine = self._engine
        plan = self._plan.with_gain(measured(engine.families))
        factors = plan.scaling(engine.clock)
        for group, own in zip(engine.param_groups, self._own, strict=True):
            factors.of(own, plan.global_batch_size).into_group(group, share)
        return float(engine.param_groups[0]["lr"]) if self._own else 0.0
