"""Measures with settings of their own under names of their own, as data: `name: (measure, settings)`.

`_normalised` are taken in the LPF paper's coordinates, in which every filter has length 1 (`filter_norms.py`); without
the ending a measure is of the weights as they are, which a ReLU network can rescale without a change of its function.
Settings are those of the papers' codes.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "lpf_normalised": ("lpf", {"normalised": True}),
    "epsilon_sharpness_normalised": ("epsilon_sharpness", {"normalised": True}),
    "pac_bayes_normalised": ("pac_bayes", {"normalised": True}),
    "local_entropy_normalised": ("local_entropy", {"normalised": True}),
    "local_entropy_gradient_normalised": ("local_entropy_gradient", {"normalised": True}),
    "lambda_max_normalised": ("lambda_max", {"of": "normalised"}),
    "trace_normalised": ("xtrace", {"of": "normalised", "samples": 25}),
    "frobenius_normalised": ("frobenius", {"of": "normalised", "draw": "gaussian"}),
    "ritz_dimension_normalised": ("ritz_dimension", {"of": "normalised"}),
    "sam_sharpness_ascended": ("sam_sharpness", {"steps": 20}),
    "sam_sharpness_linf": ("sam_sharpness", {"steps": 20, "rho": 0.001, "norm": "linf"}),
    "adaptive_sharpness_ascended": ("adaptive_sharpness", {"steps": 20}),
    "adaptive_sharpness_linf": ("adaptive_sharpness", {"steps": 20, "rho": 0.01, "norm": "linf"}),
}
STUDIED = (
    "lpf_normalised", "epsilon_sharpness_normalised", "pac_bayes_normalised", "fisher_rao", "local_entropy_normalised",
    "local_entropy_gradient_normalised", "shannon_entropy", "lambda_max_normalised", "lambda_max", "trace_normalised",
    "xtrace", "frobenius_normalised", "ritz_dimension_normalised", "sam_sharpness_ascended", "sam_sharpness_linf",
    "adaptive_sharpness_ascended", "adaptive_sharpness_linf", "inverse_mean_valley", "gradient_norm",
    "weight_norm", "distance_from_start",
)  # fmt: skip
"""What a study measures unless it names its measures; the last two are what a measure must beat to be of use
(Jiang et al. 2019).
"""
