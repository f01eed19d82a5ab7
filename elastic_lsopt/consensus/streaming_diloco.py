"""Streaming DiLoCo: DiLoCo of one fragment of the parameters at a time, exchanged while steps go on.

    fragment p of P, every tau steps, those of the others tau / P steps apart:
    D_p = x_old_p - sum_i s_i x_ip / sum_i s_i                      begun now, and `overlap` steps later:
    v_p <- m v_p + D_p;   x_p <- x_old_p - eta (D_p + m v_p);   x_ip <- alpha x_ip + (1 - alpha) x_p

Douillard, Donchev, Rush, Kale, Charles, Garrett, Teston, Lacey, McIlroy, Shen, Ramé, Szlam, Ranzato, Barham: "Streaming
DiLoCo with overlapping communication: Towards a Distributed Free Lunch", arXiv 2501.18512. The bytes are DiLoCo's, the
most of them at once a P-th; the paper tells them in 4 bits (`exchange: {bits: 4}`). The outer point x is evaluated.
Rest points: fragments = 1, overlap = 0 and alpha = 0, DiLoCo; alpha = 1, independent runs.

Differs from the paper in: 1. layers are dealt to the fragment that is the smallest so far (`fragments.py`), which for
equal layers is its strided pattern; 2. replicas that took more samples count more (s_i); 3. a fragment whose exchange
fails waits for its next turn. The defaults are what others tell
of the paper, which itself could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.consensus.diloco import DiLoCo
from elastic_lsopt.consensus.fragments import fragments_of, within
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import by_samples, require_part
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace


@register("streaming_diloco")
@dataclass(frozen=True, kw_only=True)
class StreamingDiLoCo(DiLoCo):
    """Cost: none beside the steps, which go on. Memory: two Vectors, 1/N of them per rank; four of a fragment while it
    is exchanged. Communication: one reduction of a fragment per exchange. Raises UserError for a value out of range,
    and for fewer layers than fragments."""

    lr: float = 0.4
    """eta, of the outer step; > 0. By others' accounts the paper has 0.4."""
    tau: int = 100
    """Inner steps from one exchange of a fragment to its next; a multiple of `fragments`. By accounts: 30 and 100."""
    fragments: int = 4  # type: ignore[misc]
    """P; >= 1, and at most the layers of the model. By accounts: 3 layers each."""
    overlap: int = 1  # type: ignore[misc]
    """Steps that are taken while a fragment is exchanged; >= 0 and < tau / fragments. By accounts: 1 and more."""
    alpha: float = 0.5
    """What a replica keeps of its own fragment; >= 0 and <= 1. By accounts: 0.5."""

    facts: ClassVar[Facts] = Facts(
        paper="Douillard et al. 2025, arXiv 2501.18512", passes="0", memory="2; 4/P within an exchange",
        communication="a reduction of 1/P per tau/P steps, while steps go on",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("fragments", self.fragments)
        require_count("overlap", self.overlap, least=0)
        require_part("alpha", self.alpha)
        whole = f"a multiple of fragments={self.fragments}, whose exchanges are tau / fragments steps apart"
        require(self.tau % self.fragments == 0, "tau", self.tau, whole)
        apart = f"less than tau / fragments = {self.every}, or a fragment is exchanged before the last has settled"
        require(self.overlap < self.every, "overlap", self.overlap, apart)

    def init(self, space: ParameterSpace) -> State:
        fragments_of(space.layout, self.fragments)
        return super().init(space)

    def part(self, space: ParameterSpace, number: int) -> ParameterSpace:
        return space.restricted(fragments_of(space.layout, self.fragments)[number % self.fragments])

    def snapshot(self, space: ParameterSpace, state: dict[str, Any], number: int) -> dict[str, Any]:
        return {**state, "number": number, "here": self.part(space, number).weights.clone()}

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        number, here = state["number"], state["here"]
        apart = within(self.part(space, number), state["old"]) - here  # a late replica has just been given `old`
        return number, replicas.sum(apart, by_samples(replicas)[replicas.place])

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        number, delta = heard
        part = self.part(space, number)
        old = within(part, state["old"])
        self.step(old, within(part, state["v"]), delta)
        part.weights.lerp_(old, 1 - self.alpha)
