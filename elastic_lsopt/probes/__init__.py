"""Probes: what the landscape around the weights looks like. One measure a file, named as in its paper."""

from elastic_lsopt.probes.diagonal import diagonal
from elastic_lsopt.probes.edge_of_stability import adam_edge_of_stability, edge_of_stability, preconditioned
from elastic_lsopt.probes.effective_dimension import effective_dimension
from elastic_lsopt.probes.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.filter_normalisation import filter_normalised
from elastic_lsopt.probes.fisher_rao import fisher_rao
from elastic_lsopt.probes.frobenius import frobenius
from elastic_lsopt.probes.gradient_norm import gradient_norm
from elastic_lsopt.probes.hutchinson import hutchinson
from elastic_lsopt.probes.hutchpp import hutchpp
from elastic_lsopt.probes.lanczos import lanczos
from elastic_lsopt.probes.lobpcg import lobpcg
from elastic_lsopt.probes.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.lpf import lpf
from elastic_lsopt.probes.mean_valley import mean_valley
from elastic_lsopt.probes.mode_connectivity import mode_connectivity
from elastic_lsopt.probes.noise_scale import noise_scale
from elastic_lsopt.probes.operator import Operator, operator
from elastic_lsopt.probes.pac_bayes import pac_bayes
from elastic_lsopt.probes.power_iteration import power_iteration
from elastic_lsopt.probes.sam_sharpness import sam_sharpness
from elastic_lsopt.probes.shannon_entropy import shannon_entropy
from elastic_lsopt.probes.spectral_density import spectral_density
from elastic_lsopt.probes.surface import project, surface
from elastic_lsopt.probes.trajectory import Trajectory
from elastic_lsopt.probes.trajectory_pca import trajectory_pca
from elastic_lsopt.probes.worker_disagreement import worker_disagreement
from elastic_lsopt.probes.xtrace import xtrace

__all__ = [
    "Operator",
    "Trajectory",
    "adam_edge_of_stability",
    "diagonal",
    "edge_of_stability",
    "effective_dimension",
    "epsilon_sharpness",
    "filter_normalised",
    "fisher_rao",
    "frobenius",
    "gradient_norm",
    "hutchinson",
    "hutchpp",
    "lanczos",
    "lobpcg",
    "local_entropy",
    "local_entropy_gradient",
    "lpf",
    "mean_valley",
    "mode_connectivity",
    "noise_scale",
    "operator",
    "pac_bayes",
    "power_iteration",
    "preconditioned",
    "project",
    "sam_sharpness",
    "shannon_entropy",
    "spectral_density",
    "surface",
    "trajectory_pca",
    "worker_disagreement",
    "xtrace",
]
