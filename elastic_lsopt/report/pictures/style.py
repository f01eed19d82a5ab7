"""How the report's pictures look: one palette that the colour-blind can tell apart, quiet axes, names as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREEN, YELLOW = "#4477aa", "#ee6677", "#228833", "#ccbb44"  # Paul Tol's bright scheme
CYAN, PURPLE, GREY = "#66ccee", "#aa3377", "#777777"
CYCLE = (BLUE, RED, GREEN, PURPLE, YELLOW, CYAN)
MARKERS = "os^Dv*PX<>hd"
"""A shape beside each colour of CYCLE, and others where the colours begin again."""
MAP = "viridis"
DPI = 150


def canvas(width: float = 7, height: float = 4.2) -> Figure:
    """An empty figure that makes room for its labels, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any, title: str, *, size: float = 11, limit: int = 90) -> None:
    """No box, a faint grid, the title on the left, of at most `limit` characters."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(plain(title, limit), loc="left", fontsize=size)


def against_samples(axes: Any) -> None:
    """The x axis of everything that is drawn over training."""
    axes.set_xlabel("samples seen in training")
    axes.xaxis.set_major_formatter(short)
    axes.margins(x=0.03)


def short(value: float, _: object = None) -> str:
    """A tick of an axis of counts: 800, 64k, 1.5M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def save(figure: Figure, target: Path) -> None:
    figure.savefig(target, dpi=DPI)


def plain(text: object, limit: int = 90) -> str:
    """Text as it stands: a $ begins no formula, a control character is a blank, the middle of what is long is cut."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    if len(shown) > limit:
        shown = f"{shown[: limit // 3]}…{shown[len(shown) - (limit - limit // 3 - 1) :]}"
    return shown.replace("$", r"\$")
