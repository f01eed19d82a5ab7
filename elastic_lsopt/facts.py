"""What an algorithm says of itself beside its docstring, so that one table can list all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A class attribute `facts` of a method, an update or an average; what `elastic-lsopt methods` prints.

    Counts are per step and beyond what the base alone takes; text, because some depend on a hyper-parameter.
    """

    paper: str
    """Authors, year and arXiv number."""
    passes: str = "1"
    """Gradients of the global batch, such as "2" or "1 + 1/k"."""
    memory: str = "0"
    """Numbers per parameter that are kept from step to step, 1/N of them per rank; and what is there in between."""
    communication: str = "none"
    """Beyond that of its passes."""
    needs: str = ""
    """What must be there: lso.Loss, a base with momentum, matrices; empty: nothing."""
