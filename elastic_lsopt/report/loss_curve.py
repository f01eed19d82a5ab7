"""loss.png: training and held-out loss of a run against its samples. Reads metrics.jsonl, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_loss(
    rows: Sequence[dict[str, Any]], target: Path, *, title: str, reference: tuple[str, float] | None = None
) -> None:
    """Draw the steps' `loss` (faint, and its running mean) and `eval_loss`, with a dashed line at a named reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    trained = [(r["samples"], r["loss"]) for r in rows if r["loss"] == r["loss"]]
    held_out = [(r["samples"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if trained:
        x, y = zip(*trained, strict=True)
        axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(x, _running_mean(y), color="tab:blue", label="training (running mean)")
    if held_out:
        x, y = zip(*held_out, strict=True)
        axes.plot(x, y, "o-", color="tab:orange", markersize=4, label="held out")
    if reference is not None:
        axes.axhline(
            reference[1], color="gray", linestyle="--", linewidth=1, label=f"{reference[0]} ({reference[1]:.2f})"
        )
    axes.set(xlabel="samples", ylabel="loss", title=title)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    out: list[float] = []
    for v in values:
        out.append(v if not out else keep * out[-1] + (1 - keep) * v)
    return out
