"""The measures of a study by name: the one place where a name meets a probe and its settings.

Each is a number that is larger where the minimum is thought sharper or the network more complex, at the weights where
the network has ended, on the loss of the whole training set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.oracle.units_oracle import UnitsOracle
from elastic_lsopt.probes.effective_dimension import effective_dimension
from elastic_lsopt.probes.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.filter_norms import normalised
from elastic_lsopt.probes.fisher_rao import fisher_rao
from elastic_lsopt.probes.frobenius import frobenius
from elastic_lsopt.probes.gradient_norm import gradient_norm
from elastic_lsopt.probes.lanczos import lanczos
from elastic_lsopt.probes.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.lpf import lpf
from elastic_lsopt.probes.mean_valley import mean_valley
from elastic_lsopt.probes.operator import Operator
from elastic_lsopt.probes.pac_bayes import pac_bayes
from elastic_lsopt.probes.sam_sharpness import sam_sharpness
from elastic_lsopt.probes.shannon_entropy import shannon_entropy
from elastic_lsopt.probes.spectral_density import spectral_density
from elastic_lsopt.probes.xtrace import xtrace
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class Minimum:
    """A trained network as the measures see it.

    `start` are the weights before training, `samples` those trained on, `branches()` other ends of the training: the
    weights after one more pass over the samples, each in an order of its own.
    """

    space: ParameterSpace
    oracle: UnitsOracle
    start: Vector
    samples: int
    branches: Callable[[], list[Vector]]


def _curvature(m: Minimum) -> Operator:
    """The Hessian in coordinates in which every filter has length 1, as in the LPF paper's code."""
    return normalised(m.space, m.oracle)


def _ritz_values(m: Minimum) -> tuple[float, ...]:
    """The spectrum as 100 Lanczos iterations see it, converged or not."""
    a = _curvature(m)
    return spectral_density(m.space, m.oracle, vectors=1, steps=min(100, a.dimension), of=a).nodes[0]


# The settings are those of the papers' codes, in the LPF paper's filter-normalised coordinates. What is called
# unnormalised is of the weights as they are, which a ReLU network can rescale without a change of its function.
MEASURES: dict[str, Callable[[Minimum], float]] = {
    "lpf": lambda m: lpf(m.space, m.oracle, normalised=True).value,
    "epsilon_sharpness": lambda m: epsilon_sharpness(m.space, m.oracle, normalised=True).value,
    "pac_bayes": lambda m: pac_bayes(m.space, m.oracle, initial=m.start, samples=m.samples, normalised=True).value,
    "fisher_rao": lambda m: fisher_rao(m.space, m.oracle).value,
    "local_entropy": lambda m: local_entropy(m.space, m.oracle, normalised=True).value,
    "local_entropy_gradient": lambda m: local_entropy_gradient(m.space, m.oracle, normalised=True).value,
    "shannon_entropy": lambda m: shannon_entropy(m.space, m.oracle).value,
    "lambda_max": lambda m: lanczos(m.space, m.oracle, k=1, of=_curvature(m)).eigenvalues[0],
    "lambda_max_unnormalised": lambda m: lanczos(m.space, m.oracle, k=1).eigenvalues[0],
    "trace": lambda m: xtrace(m.space, m.oracle, samples=25, of=_curvature(m)).value,
    "trace_unnormalised": lambda m: xtrace(m.space, m.oracle, samples=25).value,
    "frobenius": lambda m: frobenius(m.space, m.oracle, samples=10, draw="gaussian", of=_curvature(m)).value,
    "effective_dimension": lambda m: effective_dimension(_ritz_values(m)).value,
    "sam_sharpness": lambda m: sam_sharpness(m.space, m.oracle, rho=0.05, steps=20).value,
    "sam_sharpness_linf": lambda m: sam_sharpness(m.space, m.oracle, rho=0.001, steps=20, norm="linf").value,
    "adaptive_sharpness": lambda m: sam_sharpness(m.space, m.oracle, rho=0.5, steps=20, adaptive=True).value,
    "adaptive_sharpness_linf": lambda m: (
        sam_sharpness(m.space, m.oracle, rho=0.01, steps=20, norm="linf", adaptive=True).value
    ),
    "inverse_mean_valley": lambda m: mean_valley(m.space, m.oracle, workers=m.branches()).inverse,
    "gradient_norm": lambda m: gradient_norm(m.space, m.oracle).value,
    # What a measure must beat to be of use (Jiang et al. 2019).
    "weight_norm": lambda m: m.space.norm(m.space.weights),
    "distance_from_start": lambda m: m.space.norm(m.space.weights - m.start),
}


def chosen(config: StudyConfig) -> tuple[str, ...]:
    """The measures of a study. Raises SettingError, with the nearest name, for an unknown one."""
    for name in config.measures or ():
        if name not in MEASURES:
            raise SettingError("measures", f"measure {name!r} is unknown{did_you_mean(name, MEASURES)}")
    return config.measures or tuple(MEASURES)
