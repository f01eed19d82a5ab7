"""Space and oracle of a model as it stands, for probes and for trying a method out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.curvature.products import Mode
from elastic_lsopt.oracle.losses.default_loss import as_loss
from elastic_lsopt.oracle.losses.loss import Loss, LossFunction
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.space.geometry import ParameterSpace


def attach(
    model_or_engine: Any,
    loss_fn: Loss | LossFunction | None,
    microbatches: Sequence[Any],
    *,
    seed: int = 0,
    products: Mode = "auto",
    checked: bool = True,
) -> tuple[ParameterSpace, MicroBatchOracle]:
    """The space of a model (plain, DDP, FSDP2) or engine, and the loss on the ranks' micro-batches (collective).

        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda model, x: model(x).square().mean()      # of x = eye(2): |w|^2 / 2, whose gradient is w
        >>> space, oracle = lso.attach(model, loss_fn, [torch.eye(2)])
        >>> space.norm(oracle.gradient() - space.weights)
        0.0

    Of an engine with bi_lora the space is without its adversary; ask inside `engine.averaged("bi_lora")`.
    `products` says how curvature is multiplied with vectors: auto, kept, rebuilt, blockwise or differences. The first
    product is preceded by the checks of `oracle/curvature/curvature_checks.py` unless `checked` is False.
    Raises Unsupported and UserError as the engine does.
    """
    if isinstance(model_or_engine, Engine):
        space, backend = model_or_engine.measured()
        loss, clock = model_or_engine.loss if loss_fn is None else loss_fn, model_or_engine.clock
    else:
        backend, loss, clock = backend_for(model_or_engine), loss_fn, SampleClock()
        space = ParameterSpace(backend, seed)
    assert backend.module is not None
    loss = as_loss(loss, backend.module)
    return space, MicroBatchOracle(space, backend, loss, microbatches, clock, products=products, checked=checked)
