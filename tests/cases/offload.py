"""Cases of engines whose weights, gradients or optimizer are on the host."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.zero.steps import Branches
from tests.oracles import paper_loops

STEPS = 4


def branches_in_turn(kind: str, method: str, rounds: int = 3) -> float:
    """max |dw| from the paper's loop, with rounds of micro-batches that use one branch and the other in turn, and a
    last step that uses one alone: what DeepSpeed keeps on the host between backward passes must be of this pass.

    (In one round all ranks use the same branch: FSDP2 and ZeRO reduce what a rank has used, one after the other.)
    """
    world = dist.get_world_size()
    torch.manual_seed(0)
    plain = Branches().to(engines.DEVICE)
    steps = [
        [(x.abs() * (-1) ** (u // world + k), y) for u, (x, y) in enumerate(both)]
        for k, both in enumerate(engines.batches(STEPS, rounds * world))
    ]
    steps.append([(x.abs(), y) for x, y in steps[0]])
    hyper = engines.HYPERPARAMETERS[method]
    model = copy.deepcopy(plain)
    paper_loops.run(plain, steps, engines.optimizer("sgd")(plain.parameters()), method, hyper, clip=0.5)
    engine = engines.build(kind, model, lso.registry.build(method, **hyper), base="sgd", clip=0.5)
    for s in steps:
        engine.train_batch(engines.mine(s))
    out = engines.furthest(engine.space, plain)
    engines.close(engine)
    return out


def places(kind: str, bf16: bool = False) -> dict[str, str]:
    """On which kind of device what is; the gradient and the base's state as they are after a step."""
    engine = engines.build(kind, engines.net(), lso.SAM(), bf16=bf16)
    dtype = torch.bfloat16 if bf16 and kind.startswith("zero") else torch.float32
    [units] = engines.batches(1, dist.get_world_size(), dtype=dtype)
    engine.train_batch(engines.mine(units))
    oracle = engine.oracle(engines.mine(units))
    held = {
        "masters": engine.space.weights.tensors,
        "working": engine.backend.working,
        "gradient": oracle.gradient().tensors,
        "momentum": engine.space.base_state("momentum_buffer").tensors,
        "vector": engine.space.zeros().tensors,
    }
    out = {name: "+".join(sorted({t.device.type for t in tensors})) for name, tensors in held.items()}
    engines.close(engine)
    return {**out, "compute": engine.backend.compute_device.type}
