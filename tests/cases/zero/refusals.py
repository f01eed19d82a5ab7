"""Cases of what is refused: JSON files, engines of the user's own, other versions of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import elastic_lsopt as lso
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy


def refused(config: dict[str, Any], **keywords: Any) -> str:
    """What `lso.initialize` says about this JSON: the error's type and its message."""
    return said(
        lambda: lso.initialize(
            model=engines.net(), config=config, base=engines.optimizer("sgd"), loss_fn=cross_entropy, **keywords
        )
    )


def refused_scalar() -> str:
    """What `lso.initialize` says of CLIP's kind of temperature."""
    model = engines.net()
    model.register_parameter("temperature", torch.nn.Parameter(torch.tensor(1.0)))
    config = {"zero_optimization": {"stage": 1}}
    return said(
        lambda: lso.initialize(model=model, config=config, base=engines.optimizer("sgd"), loss_fn=cross_entropy)
    )


def refused_engine(config: dict[str, Any], optimizer: str = "sgd", **keywords: Any) -> str:
    """What our backend says about an engine that the user made with DeepSpeed."""
    import deepspeed

    from elastic_lsopt.backends.zero.start import start_distributed

    world = start_distributed()
    model = engines.net()
    whole = {
        "train_batch_size": world * config.get("gradient_accumulation_steps", 1),
        "train_micro_batch_size_per_gpu": 1,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=engines.optimizer(optimizer)(model.parameters()), config={**whole, **config}
    )
    try:
        return said(lambda: lso.attach(engine, cross_entropy, engines.mine(engines.batches(1, 3)[0])))
    finally:
        engine.destroy()


def refused_version(version: str) -> str:
    import deepspeed

    found, deepspeed.__version__ = deepspeed.__version__, version
    try:
        return refused({})
    finally:
        deepspeed.__version__ = found


def refused_insides(name: str) -> str:
    """A DeepSpeed optimizer without one of the attributes that we use."""
    from elastic_lsopt.backends.zero import zero_backend as zero

    zero.PRIVATE["DeepSpeedZeroOptimizer"] += (name,)
    try:
        return refused({"zero_optimization": {"stage": 2}})
    finally:
        zero.PRIVATE["DeepSpeedZeroOptimizer"] = zero.PRIVATE["DeepSpeedZeroOptimizer"][:-1]


def said(call: Callable[[], Any]) -> str:
    try:
        engine = call()
    except lso.UserError as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(engine, lso.Engine):
        engines.close(engine)
    return "accepted"
