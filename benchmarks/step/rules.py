"""What a step of each gradient rule costs beside the base passes that it is made of, on the same backend.

    <rule>_<backend>_of_its_passes     its seconds over those of as many base steps as it has taken passes
    momentum_sam_…, lpf_sgd_…          of one pass, so the same as over a base step
    looksam_…_of_base_step             five steps over five of the base: one of them is SAM's
    functional_sam_…_of_sam            over a step of SAM, in the same rounds

A base step is our engine's with method none, so the ratio holds what the rule adds and nothing else: the perturbation,
its way back, and the gathers that they make necessary. Passes are those that the step reports, as rules that choose
(ae_sam, esam) take more or less from step to step; a forward that is no pass (esam's) counts what a forward takes.
Each rule has a base step beside it in every round: a machine that slows down for a minute slows both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.models import LOSS, SIZES, beside, engine, units
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks
from elastic_lsopt.optimizers import registry

BACKENDS = ("fsdp2", "zero2")
EVERYWHERE = (*BACKENDS, "ddp", "zero3")


@dataclass(frozen=True)
class Rule:
    """A method by name, the micro-batches per rank that it needs, and how many steps make one turn."""

    name: str
    fields: dict[str, Any]
    microbatches: int = 1
    steps: int = 1
    forwards: int = 0
    """Forwards of the batch per step that no gradient follows."""
    backends: tuple[str, ...] = BACKENDS


RULES = (
    Rule("sam", {"rho": 0.05}, backends=EVERYWHERE), Rule("functional_sam", {"rho": 0.05}), Rule("asam", {"rho": 0.5}),
    Rule("momentum_sam", {"rho": 0.3}), Rule("gsam", {}), Rule("friendly_sam", {}), Rule("wsam", {}),
    Rule("looksam", {"k": 5}, steps=5), Rule("ae_sam", {}), Rule("esam", {}, forwards=1), Rule("sampa", {}),
    Rule("random_sam", {}),
    Rule("rwp", {}, microbatches=2),  # of which each of its two gradients takes one
    Rule("m_sam", {"parts": 2}, microbatches=2),
    Rule("lpf_sgd", {"parts": 2, "gamma": 5e-4, "alpha": 1.0}, microbatches=2, backends=EVERYWHERE),
    Rule("entropy_sgd", {"inner_steps": 2}, microbatches=2),
)  # fmt: skip


def compare(kind: str, size: str) -> dict[str, object]:
    """Every rule that is measured on this backend, inside a process group (collective)."""
    base = engine(kind, SIZES[size], lso.Plain())
    figures: dict[str, object] = {}
    for rule in RULES:
        if kind in rule.backends:
            figures |= _compared(base, kind, size, rule)
    return figures


def _compared(base: lso.Engine, kind: str, size: str, rule: Rule) -> dict[str, object]:
    """A rule's figures, from rounds of its own."""
    pairs, batch = SIZES[size].pairs, units(SIZES[size], rule.microbatches)
    ours = beside(base, registry.build(rule.name, **rule.fields), total_samples=10**9)  # ae_sam asks
    passes: list[float] = []

    def own_steps() -> None:
        passes.append(sum(_passes(ours, batch) for _ in range(rule.steps)))

    works: dict[str, Callable[[], object]] = {"base": lambda: base.train_batch(batch), "ours": own_steps}
    if rule.forwards:
        works["forward"] = lambda: _forward(base, batch)
    if rule.name == "functional_sam":
        sam = beside(base, lso.SAM(rho=0.05))
        works["sam"] = lambda: sam.train_batch(batch)
    times = rounds(pairs, **works)
    forwards = [rule.forwards * t for t in times.get("forward", [0.0] * pairs)]
    own = zip(passes[-pairs:], times["base"], forwards, strict=True)  # without the warm-up's
    figures = ratio_of(times["ours"], [p * t + f for p, t, f in own]).figures(f"{rule.name}_{kind}_of_its_passes")
    if rule.name == "looksam":
        of_steps = ratio_of(times["ours"], [rule.steps * t for t in times["base"]])
        figures |= of_steps.figures(f"looksam_{kind}_of_base_step")
    if rule.name == "functional_sam":
        figures |= ratio_of(times["ours"], times["sam"]).figures(f"functional_sam_{kind}_of_sam")
    return figures


def _passes(engine: lso.Engine, batch: list[Any]) -> float:
    """Those of one step."""
    engine.train_batch(batch)
    assert engine.last_step is not None and not engine.last_step.skipped, "a skipped step measures nothing"
    return engine.last_step.passes


@torch.no_grad()
def _forward(engine: lso.Engine, batch: list[Any]) -> None:
    for microbatch in batch:
        LOSS.criterion(LOSS.forward(engine.module, microbatch), microbatch)


def run() -> dict[str, object]:
    """All backends, one after another, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for kind in EVERYWHERE:
        figures |= on_ranks("benchmarks.step.rules:compare", kind=kind, size=size)
    return figures
