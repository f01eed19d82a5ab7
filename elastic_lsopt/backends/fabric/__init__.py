"""How processes talk, and stop talking: one file a library. The runtime asks a `Fabric` and knows none of them."""

from elastic_lsopt.backends.fabric.fabric import Fabric
from elastic_lsopt.backends.fabric.gloo import Gloo
from elastic_lsopt.backends.fabric.nccl import NCCL
from elastic_lsopt.backends.fabric.reconfigured import Reconfigured, ReconfiguredNCCL

__all__ = ["NCCL", "Fabric", "Gloo", "Reconfigured", "ReconfiguredNCCL", "fabric_for"]


def fabric_for(device_type: str) -> Fabric:
    """The fabric for a device, "cpu" or "cuda", and the torch that is installed."""
    if device_type == "cuda":
        return ReconfiguredNCCL() if ReconfiguredNCCL.supported() else NCCL()
    return Reconfigured() if Reconfigured.supported() else Gloo()
