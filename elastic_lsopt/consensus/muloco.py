"""MuLoCo: DiLoCo whose inner optimizer is Muon.

    the outer step of DiLoCo, with lr 0.9 and momentum 0.8

Thérien, Huang, Rish, Belilovsky: "MuLoCo: Muon is a practical inner optimizer for DiLoCo", arXiv 2505.23725. Rest
point: lr = 1 and momentum = 0, local SGD with Muon inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.consensus.diloco import DiLoCo
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.facts import Facts


@register("muloco")
@dataclass(frozen=True, kw_only=True)
class MuLoCo(DiLoCo):
    """Cost, memory and communication are DiLoCo's. Raises UserError where the base has no muon."""

    lr: float = 0.9
    """eta, of the outer step; > 0. The authors' configuration of two replicas: 0.9."""
    momentum: float = 0.8
    """m, Nesterov's; >= 0 and < 1. The authors: 0.8."""
    tau: int = 30
    """Inner steps; >= 1. The authors: 30."""

    needs_update: ClassVar[str] = "muon"
    facts: ClassVar[Facts] = Facts(
        paper="Thérien, Huang, Rish, Belilovsky 2025, arXiv 2505.23725", passes="0", memory="2; 3 within an exchange",
        communication="a reduction per tau steps", needs="the update muon",
    )  # fmt: skip
