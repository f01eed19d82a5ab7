"""What a step of each gradient rule costs beside the base passes that it is made of, on the same backend.

    <rule>_<backend>_of_its_passes     its seconds over those of as many base steps as it has taken passes
    momentum_sam_…_of_base_step        of one pass, so the same number
    looksam_…_of_base_step             five steps over five of the base: one of them is SAM's
    functional_sam_…_of_sam            over a step of SAM, in the same rounds

A base step is our engine's with method none, so the ratio holds what the rule adds and nothing else. Passes are those
that the step reports, as rules that choose (ae_sam, esam) take more or less from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.models import SIZES, beside, engine, units
from benchmarks.timing import Ratio, ratio_of, rounds
from benchmarks.workers import on_ranks
from elastic_lsopt.optimizers import registry

BACKENDS = ("fsdp2", "zero2")


@dataclass(frozen=True)
class Rule:
    """A method by name, the micro-batches per rank that it needs, and how many steps make one turn."""

    name: str
    fields: dict[str, Any]
    microbatches: int = 1
    steps: int = 1


TOGETHER: tuple[tuple[Rule, ...], ...] = (
    (
        Rule("sam", {"rho": 0.05}), Rule("functional_sam", {"rho": 0.05}), Rule("asam", {"rho": 0.5}),
        Rule("momentum_sam", {"rho": 0.3}),
    ),
    (Rule("gsam", {}), Rule("friendly_sam", {}), Rule("wsam", {}), Rule("looksam", {"k": 5}, steps=5)),
    (Rule("ae_sam", {}), Rule("esam", {}), Rule("sampa", {}), Rule("random_sam", {})),
    (Rule("rwp", {}, microbatches=2),),  # of which each of its two gradients takes one
    (
        Rule("m_sam", {"parts": 4}, microbatches=4), Rule("lpf_sgd", {"parts": 4, "gamma": 5e-4}, microbatches=4),
        Rule("entropy_sgd", {"inner_steps": 4}, microbatches=4),
    ),
)  # fmt: skip
"""Rules that are timed in the same rounds, beside one base of their micro-batches."""


def compare(kind: str, size: str) -> dict[str, object]:
    """Every rule on one backend, inside a process group (collective)."""
    base = engine(kind, SIZES[size], lso.Plain())
    figures: dict[str, object] = {}
    for rules in TOGETHER:
        figures |= _turns(base, kind, size, rules)
    return figures


def _turns(base: lso.Engine, kind: str, size: str, rules: Sequence[Rule]) -> dict[str, object]:
    """Figures of some rules, from rounds of their own."""
    pairs, batch = SIZES[size].pairs, units(SIZES[size], rules[0].microbatches)
    passes: dict[str, list[float]] = {rule.name: [] for rule in rules}

    def work(rule: Rule) -> Callable[[], None]:
        ours = beside(base, registry.build(rule.name, **rule.fields), total_samples=10**9)  # ae_sam asks
        own = batch[: rule.microbatches]

        def steps() -> None:
            taken = 0.0
            for _ in range(rule.steps):
                ours.train_batch(own)
                assert ours.last_step is not None and not ours.last_step.skipped, "a skipped step measures nothing"
                taken += ours.last_step.passes
            passes[rule.name].append(taken)

        return steps

    times = rounds(pairs, base=lambda: base.train_batch(batch), **{rule.name: work(rule) for rule in rules})
    figures: dict[str, object] = {}

    def told(figure: str, ours: list[float], base_seconds: list[float]) -> Ratio:
        ratio = ratio_of(ours, base_seconds)
        figures.update(ratio.figures(figure))
        return ratio

    for rule in rules:
        taken = passes[rule.name][-pairs:]  # without the warm-up's
        of_passes = [p * t for p, t in zip(taken, times["base"], strict=True)]
        told(f"{rule.name}_{kind}_of_its_passes", times[rule.name], of_passes)
        if rule.name == "looksam":
            told(f"looksam_{kind}_of_base_step", times[rule.name], [rule.steps * t for t in times["base"]])
        if rule.name == "functional_sam":
            told(f"functional_sam_{kind}_of_sam", times[rule.name], times["sam"])
    return figures


def run() -> dict[str, object]:
    """Both backends, one after another, each in processes of its own."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for kind in BACKENDS:
        figures |= on_ranks("benchmarks.step.family:compare", kind=kind, size=size)
    return figures
