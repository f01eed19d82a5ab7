"""Probes: what the landscape around the weights looks like. One measure a file, named as in its paper."""

from elastic_lsopt.probes.catalogue import register
from elastic_lsopt.probes.flatness.effective_dimension import effective_dimension
from elastic_lsopt.probes.flatness.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.flatness.filter_normalisation import filter_normalised
from elastic_lsopt.probes.flatness.fisher_rao import fisher_rao
from elastic_lsopt.probes.flatness.gradient_norm import gradient_norm
from elastic_lsopt.probes.flatness.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.flatness.logit_share import logit_share
from elastic_lsopt.probes.flatness.lpf import lpf
from elastic_lsopt.probes.flatness.mean_valley import mean_valley
from elastic_lsopt.probes.flatness.pac_bayes import pac_bayes
from elastic_lsopt.probes.flatness.sam_sharpness import sam_sharpness
from elastic_lsopt.probes.flatness.shannon_entropy import shannon_entropy
from elastic_lsopt.probes.noise.noise_scale import noise_scale
from elastic_lsopt.probes.noise.worker_disagreement import worker_disagreement
from elastic_lsopt.probes.spectrum.diagonal import diagonal
from elastic_lsopt.probes.spectrum.frobenius import frobenius
from elastic_lsopt.probes.spectrum.hutchinson import hutchinson
from elastic_lsopt.probes.spectrum.hutchpp import hutchpp
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.lobpcg import lobpcg
from elastic_lsopt.probes.spectrum.operator import Operator, operator
from elastic_lsopt.probes.spectrum.power_iteration import power_iteration
from elastic_lsopt.probes.spectrum.spectral_density import spectral_density
from elastic_lsopt.probes.spectrum.xtrace import xtrace
from elastic_lsopt.probes.surface.mode_connectivity import mode_connectivity
from elastic_lsopt.probes.surface.surface import project, surface
from elastic_lsopt.probes.trajectory.edge_of_stability import adam_edge_of_stability, edge_of_stability, preconditioned
from elastic_lsopt.probes.trajectory.trajectory import Trajectory
from elastic_lsopt.probes.trajectory.trajectory_pca import trajectory_pca

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
    "logit_share",
    "lpf",
    "mean_valley",
    "mode_connectivity",
    "noise_scale",
    "operator",
    "pac_bayes",
    "power_iteration",
    "preconditioned",
    "project",
    "register",
    "sam_sharpness",
    "shannon_entropy",
    "spectral_density",
    "surface",
    "trajectory_pca",
    "worker_disagreement",
    "xtrace",
]
