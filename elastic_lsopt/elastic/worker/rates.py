"""The plan's hyper-parameters, into the base optimizer's param groups, before each step."""

from __future__ import annotations

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.plan import Plan
from elastic_lsopt.schedules.adascale import GAIN, measured
from elastic_lsopt.schedules.group_rates import GroupRates


class Rates:
    """Each group's own hyper-parameters, as it had them when it was built, times what the plan says.

    Under the rule adascale the rate follows the gain as it is measured, step by step. Raises Unsupported where adascale
    has nothing that measures it, or sqrt meets betas that its batch does not permit.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        self._groups = GroupRates(
            engine.param_groups, plan.reference.global_batch_size, plan.rule, [plan.global_batch_size],
            "say them in the file (optim_args: {betas: …}), so that the batch is held, or set "
            "elastic.max_global_batch_size.",
        )  # fmt: skip
        if plan.rule == "adascale" and GAIN not in engine.families:
            raise Unsupported(
                "lr_rule=adascale needs a measured gain: give the engine "
                "keep=[GainMonitor(horizon_samples=…)] of elastic_lsopt.schedules.adascale."
            )

    def set(self, share: float) -> float:
        """For the step that begins now; `share` of the peak rate is the schedule's. Returns the first group's rate."""
        engine = self._engine
        plan = self._plan.with_gain(measured(engine.families))
        return self._groups.set(engine.param_groups, plan.scaling(engine.clock), plan.global_batch_size, share)
