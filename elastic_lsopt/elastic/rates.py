"""The plan's hyper-parameters, into the base optimizer's param groups, before each step."""

from __future__ import annotations

from elastic_lsopt.elastic.plan import Plan
from elastic_lsopt.faces.engine import Engine
from elastic_lsopt.schedules.batch_scaling import Hyperparameters


class Rates:
    """Each group's own hyper-parameters, as it had them when it was built, times what the plan says.

    Groups may differ (biases without weight decay): each is scaled for itself.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        batch = plan.reference.global_batch_size
        self._own = [Hyperparameters.of_group(group, batch) for group in engine.param_groups]

    def set(self, share: float) -> float:
        """For the step that begins now; `share` of the peak rate is the schedule's. Returns the first group's rate."""
        scaling = self._plan.scaling(self._engine.clock)
        for group, own in zip(self._engine.param_groups, self._own, strict=True):
            scaling.of(own, self._plan.global_batch_size).into_group(group, share)
        return float(self._engine.param_groups[0]["lr"]) if self._own else 0.0
