"""The measures by name: what a table and an axis call them, in which unit, and what each says in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measure:
    """How a measure is shown."""

    title: str
    unit: str
    meaning: str

    @property
    def label(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


CURVATURE = "nats / weight²"
MEASURES = {
    "top_eigenvalues": Measure("largest eigenvalues", CURVATURE, "curvature along the steepest directions"),
    "lambda_max": Measure("λ max", CURVATURE, "curvature along the steepest direction"),
    "trace": Measure("trace of the Hessian", CURVATURE, "sum of all curvatures"),
    "hutchpp": Measure("trace of the Hessian (Hutch++)", CURVATURE, "sum of all curvatures"),
    "xtrace": Measure("trace of the Hessian (XTrace)", CURVATURE, "sum of all curvatures"),
    "frobenius": Measure("Frobenius norm", CURVATURE, "root of the sum of squared curvatures"),
    "lpf": Measure("LPF measure", "nats", "mean loss under Gaussian noise on the weights: a wide valley keeps it low"),
    "epsilon_sharpness": Measure(
        "ε-sharpness", "1 / weight", "inverse distance along the gradient at which the loss has risen by ε"
    ),
    "pac_bayes": Measure(
        "PAC-Bayes", "", "a bound's size: distance from the start against the noise that the loss withstands"
    ),
    "fisher_rao": Measure("Fisher-Rao norm", "nats", "the weights' length in the metric of the curvature, w'Hw"),
    "local_entropy": Measure("local entropy", "nats", "lower where more of the neighbourhood has a low loss"),
    "local_entropy_gradient": Measure(
        "local entropy's gradient", "weight", "how far the weights are from the middle of their neighbourhood"
    ),
    "shannon_entropy": Measure("Shannon entropy", "nats", "how undecided the model's own predictions are"),
    "effective_dimension": Measure("effective dimension", "directions", "how many directions the loss determines"),
    "ritz_dimension": Measure("dimension of the Ritz values", "directions", "how many directions the loss determines"),
    "weight_norm": Measure("length of the weights", "weight", "how far the weights are from zero"),
    "distance_from_start": Measure("distance from the start", "weight", "how far the training has moved the weights"),
    "sam_sharpness": Measure("SAM sharpness", "nats", "rise of the loss at the worst point within a small radius"),
    "adaptive_sharpness": Measure(
        "adaptive sharpness", "nats", "SAM sharpness with a radius relative to each weight's size"
    ),
    "logit_share": Measure("logits' share", "", "part of what SAM adds to the gradient that comes by the logits"),
    "mean_valley": Measure("mean valley", "weight", "distance from the workers' mean to where the loss is a multiple"),
    "gradient_norm": Measure("gradient norm", "nats / weight", "steepness where the weights are; 0 at a minimum"),
    "edge_of_stability": Measure(
        "edge-of-stability ratio",
        "",
        "sharpness over the threshold above which a step overshoots; 1 is the edge",
    ),
    "noise_scale": Measure(
        "gradient noise scale", "samples", "batch size at which the gradient's noise equals its signal"
    ),
}
ENDINGS = {"_normalised": ", filter-normalised", "_linf": " (L∞)", "_ascended": ", 20 steps"}
"""What presets of a measure end with, and how they are shown."""
SPECIAL = ("edge_of_stability", "noise_scale")
"""Measures with a picture of their own."""


def measure(name: str, of: str | None = None) -> Measure:
    """How a probe is shown that measures `of` (default: what its name says); an unknown one by its name."""
    if of is not None and of != name and of in MEASURES:
        return replace(MEASURES[of], title=name)
    for ending, words in ENDINGS.items():
        if (plain := MEASURES.get(name.removesuffix(ending))) is not None and name.endswith(ending):
            return replace(plain, title=plain.title + words)
    return MEASURES.get(name) or Measure(name.replace("_", " "), "", "")
