"""Offload: which parts of a rank's memory lie on the host, and what DeepSpeed keeps beside. Pure arithmetic.

    fsdp2, fsdp_cpu_offload          weights, gradient, optimizer and all Vectors, as many as there were on the device
    ZeRO 1 to 3, offload_optimizer   masters, their gradient, optimizer and all Vectors
    ZeRO 3, offload_param            weights

With P trainable parameters, L of them in the largest, N ranks and c bytes a weight, offload_optimizer adds

    ZeRO 1, 2    host    c (P/N + L)    the weights on their way back, a gradient on its way
                         4 P/N          the masters' gradient, from step to step
                         c P/N          ZeRO 2, of several micro-batches: the sum of those before; a parameter that
                                        the cut between ranks goes through is there whole
                 device  c L            a gradient on its way
    ZeRO 3       host    4 P/N          the masters' gradient, beside the buffer of c P/N

Read from DeepSpeed 0.19.8, and counted by tests/training/estimate/test_measured.py. What a GPU takes while a shard is
on its way to it is not counted.
"""

from __future__ import annotations

from elastic_lsopt.training.estimate.placement import FP32, Placement
from elastic_lsopt.training.estimate.size import ModelSize

OF_THE_WEIGHTS = {"weights", "frozen weights"}
OF_THE_OPTIMIZER = {
    "master weights", "gradient buffer", "gradient in fp32", "sum of gradients", "offload buffers", "optimizer state",
    "averages of the weights", "what schedules watch", "direction of the method", "temporaries of the optimizer",
    "probes", "probes while they measure",
}  # fmt: skip
OF_FSDP2 = OF_THE_WEIGHTS | OF_THE_OPTIMIZER | {"gradient", "way back of a perturbation"}


def kept_beside(size: ModelSize, at: Placement, *, microbatches: int) -> dict[str, int]:
    """What DeepSpeed keeps from step to step because its optimizer is on the host, the device's part among it."""
    if at.backend != "deepspeed" or not at.optimizer_on_host:
        return {}
    share = at.share(size.parameters)
    if at.stage == 3:
        return {"gradient in fp32": FP32 * share}
    return {
        "gradient in fp32": FP32 * share,
        "sum of gradients": at.compute * share if at.stage == 2 and microbatches > 1 else 0,
        "offload buffers": at.compute * (share + size.largest),
        "buffer of a gradient on its way": at.compute * size.largest,
    }


def on_host(at: Placement) -> set[str]:
    """The names of the parts that are on the host."""
    if at.backend == "fsdp2":
        return OF_FSDP2 if at.optimizer_on_host else set()
    return (OF_THE_WEIGHTS if at.weights_on_host else set()) | (OF_THE_OPTIMIZER if at.optimizer_on_host else set())
