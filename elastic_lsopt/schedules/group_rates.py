"""The hyper-parameters of a base's param groups, each as it was when it was built, times what a rule says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elastic_lsopt.errors import Unsupported
from elastic_lsopt.schedules.batch_scaling import Hyperparameters, Rule, Scaling, permits


class GroupRates:
    """Groups may differ (biases without weight decay): each is scaled for itself.

    `batch` is the one that the groups' hyper-parameters are for, `batches` are those that will come. Raises Unsupported
    where the rule does not hold there; `fix` says what to do.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], batch: int, rule: Rule, batches: Iterable[int], fix: str
    ) -> None:
        self._own = [Hyperparameters.of_group(group, batch) for group in groups]
        for i, own in enumerate(self._own):
            for other in batches:
                if not permits(own, other, rule):
                    raise Unsupported(
                        f"param group {i}: the rule sqrt cannot take betas={own.betas} from a batch of {batch} to "
                        f"{other}; {fix}"
                    )

    def set(self, groups: Sequence[dict[str, Any]], factors: Scaling, batch: int, share: float) -> float:
        """For a step on `batch` samples; `share` of the peak rate is the schedule's. Returns the first group's rate."""
        for group, own in zip(groups, self._own, strict=True):
            factors.of(own, batch).into_group(group, share)
        return float(groups[0]["lr"]) if self._own else 0.0
