"""Vectors that a probe holds while it measures, by what the probes' own docstrings state. Pure arithmetic.

lambda_max, top_eigenvalues, edge_of_stability       4 and the basis, up to its capacity (Krylov spaces)
spectral_density, ritz_ and effective_dimension      4 and a basis of `steps`
hutchpp, xtrace, trace_normalised                    3 and `samples`
lobpcg                                               8 (k + guard)
power_iteration                                      k + 2
others                                               4: what is multiplied, the product, the point, the way back
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_lsopt.config.probes import TRAJECTORY, read_probes
from elastic_lsopt.probes.catalogue import MEASURES

FEW, CAPACITY = 4, 100
OF_A_TRAJECTORY = 3
"""Kept from step to step: the start, the last point, the last update."""


def probe_vectors(block: Mapping[str, Any]) -> tuple[int, int]:
    """Of a job's `probes:`, the vectors that are kept from step to step, and the most that one holds at work."""
    probes = read_probes(block).values()
    kept = OF_A_TRAJECTORY if any(probe.measure == TRAJECTORY for probe in probes) else 0
    return kept, max((_while_measuring(str(p.measure), p.settings) for p in probes), default=0)


def _while_measuring(measure: str, given: Mapping[str, Any]) -> int:
    known = MEASURES.get(measure)
    own = {**(known.settings if known else {}), **given}
    if str(own.get("basis_device") or "") == "cpu":
        return FEW  # the basis lies in host memory
    if "capacity" in own:
        return FEW + int(own["capacity"])
    if measure == "edge_of_stability":
        return FEW + CAPACITY
    if "guard" in own:
        return 8 * (int(own["k"]) + int(own["guard"]))
    if measure == "spectral_density" or "regulariser" in own:
        return FEW + int(own["steps"])
    if "samples" in own and "basis_device" in own:
        return int(own["samples"]) + 3
    return int(own["k"]) + 2 if "max_iterations" in own else FEW
