"""The report's pictures in order: what draws each, what it means in a sentence, and which probe it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_lsopt.report.pictures.draw_comparison import draw_comparison
from elastic_lsopt.report.pictures.draw_disagreement import draw_disagreement
from elastic_lsopt.report.pictures.draw_loss_curve import draw_loss
from elastic_lsopt.report.pictures.draw_members import draw_members
from elastic_lsopt.report.pictures.draw_over_training import draw_measures, draw_noise, draw_spent
from elastic_lsopt.report.pictures.draw_spectrum import draw_density, draw_eigenvalues
from elastic_lsopt.report.pictures.draw_study import draw_ranking, draw_scatter
from elastic_lsopt.report.pictures.draw_surface import draw_connectivity, draw_surface
from elastic_lsopt.report.pictures.draw_trajectory import draw_alignment, draw_motion, draw_ratios
from elastic_lsopt.report.pictures.style import plain
from elastic_lsopt.report.run import EIGENVALUES, Run, held_out_metrics

CAVEAT = (
    "Sharpness is a diagnostic, not a score. For transformers, and for much modern training, sharpness often does not "
    "predict generalization, adaptive sharpness included: it goes with the learning rate rather than with the error "
    "on held-out data (Andriushchenko, Croce, Müller, Hein, Flammarion 2023, “A Modern Look at the Relationship "
    "between Sharpness and Generalization”, arXiv 2302.07011). Read curvature here as a picture of the training's "
    "dynamics, and judge models by held-out loss."
)


@dataclass(frozen=True)
class Section:
    """One picture. `draw` returns what it shows in words, None where the run has nothing to draw."""

    key: str
    title: str
    meaning: str
    draw: Callable[[Run, Path], str | None]
    of: str
    """rows (a training run), probes (a training run or a finished model), study, comparison: what there must be."""
    probe: str | None = None
    """The measure that it is drawn from, which a missing picture's line names."""
    kinds: tuple[str, ...] = ()
    """The measures of which each probe with a name of its own gets a picture of its own."""
    asks: str | None = None
    """What `elastic-lsopt probe` must be given for it, where no job can measure it."""


def _loss(run: Run, target: Path) -> str | None:
    losses = [row for row in run.rows if row.get("loss") is not None or row.get("eval_loss") is not None]
    losses = [row for row in losses if row.get("samples") is not None]
    if not losses:
        return None
    draw_loss(losses, target, title=f"Loss of {plain(run.name, 60)}")
    held_out = [row for row in losses if row.get("eval_loss") is not None]
    if not held_out:
        return "No held-out loss in this run."
    metrics = "".join(f", {plain(name, 40)} {value:.4f}" for name, value in held_out_metrics(held_out[-1]))
    return f"Held-out loss {held_out[-1]['eval_loss']:.4f} nats{metrics} at the end."


def _members(run: Run, target: Path) -> str | None:
    rows = [row for row in run.rows if row.get("samples") is not None]
    changes = [change for change in run.changes if {"samples", "gone"} <= change.keys()]
    if not changes or not rows:
        return None
    draw_members(rows, changes, target, title=f"Members of {plain(run.name, 60)}, batch, rate and loss")
    return f"{len(changes)} generations."


SECTIONS = (
    Section(
        "loss", "Loss",
        "The loss on training batches (faint; bold: smoothed) and on held-out data. The distance between the two is "
        "the generalisation gap.",
        _loss, "rows",
    ),
    Section(
        "disagreement", "Disagreement of the replicas",
        "How far the replicas have come apart when they meet: the root mean square of their distances from their mean "
        "(consensus distance), and the mean (valley width). Both grow with the learning rate and with the steps from "
        "one exchange to the next: compare them at the same ones. By one account (Dimlioglu, Topollai, Choromanska "
        "2026, arXiv 2605.27739) replicas come apart most where the loss is sharp: the squares say how far that is so "
        "here, where top eigenvalues were measured.",
        draw_disagreement, "rows",
    ),
    Section(
        "spectral_density", "Spectral density",
        "How many directions of weight space have which curvature: most eigenvalues lie in a bulk near zero, where the "
        "loss is flat, and a few stand apart (marked), often about as many as there are classes or clusters in the "
        "data. Negative eigenvalues are directions in which the loss still bends down.",
        draw_density, "probes", "spectral_density", ("spectral_density",),
    ),
    Section(
        "eigenvalues", "Eigenvalues and the edge of stability",
        "Plain gradient descent with step size η is stable along a direction only while its eigenvalue is below 2/η. "
        "Training with large batches often raises the largest eigenvalue until it hovers at that line. With momentum "
        "or Adam the line lies elsewhere: compare the lower panel, where there is one.",
        draw_eigenvalues, "rows", "top_eigenvalues", (*EIGENVALUES, "edge_of_stability"),
    ),
    Section(
        "measures", "Measures of flatness",
        "Each measure answers in its own unit how much the loss rises near the weights. They scale differently with "
        "the model and its normalization, so compare a measure with itself over time, never with another.",
        draw_measures, "rows", "lpf",
    ),
    Section(
        "surface", "Loss surface",
        "A slice through the loss with the trained weights at the star. It shows one or two directions of very many: "
        "a smooth bowl here does not mean that there are no sharp directions.",
        draw_surface, "probes", "surface", ("surface",),
    ),
    Section(
        "mode_connectivity", "Between two models",
        "The barrier is how far the loss rises above the straight line between the two models' losses. None means that "
        "both lie in one valley; a curve without a barrier, where the line has one, means a bent valley.",
        draw_connectivity, "probes", "mode_connectivity", ("mode_connectivity",),
        "--other MODEL",
    ),
    Section(
        "trajectory", "Angles and distances",
        "Below 90° an update goes on in the direction of the one before; above, the steps bounce between the walls of "
        "a valley. A path much longer than the distance from the start is diffusion, not progress.",
        draw_motion, "rows", "trajectory", ("trajectory",),
    ),
    Section(
        "alignment", "Alignment with the sharpest directions",
        "A cosine near 1 means movement along the steepest walls; near 0, movement in the flat bulk. Random directions "
        "have a cosine of about one over the root of the number of weights.",
        draw_alignment, "rows", "trajectory", ("trajectory",),
    ),
    Section(
        "update_to_weight", "Update against weight, by parameter",
        "How much each parameter changes in one step. Around 0.001 is a common rule of thumb; parameters far above it "
        "may be unstable, far below it they hardly learn. Grey: zero or not known.",
        draw_ratios, "rows", "trajectory", ("trajectory",),
    ),
    Section(
        "noise_scale", "Gradient noise and batch size",
        "Where the batch is far below the noise scale, a larger batch saves almost as many steps as it costs samples; "
        "far above it, more samples a step buy hardly anything (McCandlish et al. 2018, arXiv 1812.06162).",
        draw_noise, "rows", "noise_scale", ("noise_scale",),
    ),
    Section(
        "members", "Members of the elastic job",
        "Workers, batch, rate and loss over training; dotted lines are changes of members, red where a worker was "
        "lost.",
        _members, "rows",
    ),
    Section(
        "probe_seconds", "What the probes cost",
        "Seconds of the whole run by probe, beside the training steps. A shorter budget or a longer period lowers it.",
        draw_spent, "rows",
    ),
    Section(
        "ranking", "Ranking of the measures",
        "Kendall's τ is 1 where the measure orders the models exactly as their generalisation gaps do, -1 where in "
        "reverse, 0 where it tells nothing. It is a correlation over this grid of models, not a cause.",
        draw_ranking, "study",
    ),
    Section(
        "study", "Measures against the gap",
        "A point a model. A ranking may come from one setting that drives both (the learning rate, say): clusters in "
        "the points are the sign of it.",
        draw_scatter, "study",
    ),
    Section(
        "comparison", "Methods side by side",
        "Each method with the best values of its own grid. Intervals that overlap do not show that methods are alike, "
        "nor a lower mean that a method is better elsewhere: this is one task.",
        draw_comparison, "comparison",
    ),
)  # fmt: skip
