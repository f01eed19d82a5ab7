"""Space and oracle of a model as it stands, for probes and for trying a method out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.faces.engine import Engine
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.loss import Loss, LossFunction, as_loss
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.units_oracle import UnitsOracle
from elastic_lsopt.space.geometry import ParameterSpace


def attach(
    model_or_engine: Any, loss_fn: Loss | LossFunction | None, microbatches: Sequence[Any], *, seed: int = 0
) -> tuple[ParameterSpace, Oracle]:
    """The space of a model (plain, DDP, FSDP2) or engine, and the loss on the ranks' micro-batches (collective).

    Raises Unsupported and UserError as the engine does.
    """
    if isinstance(model_or_engine, Engine):
        if loss_fn is None:
            return model_or_engine.space, model_or_engine.oracle(microbatches)
        backend, space = model_or_engine.backend, model_or_engine.space
    else:
        backend = backend_for(model_or_engine)
        space = ParameterSpace(backend, seed)
    assert backend.module is not None
    return space, UnitsOracle(space, backend, as_loss(loss_fn, backend.module), microbatches, SampleClock())
