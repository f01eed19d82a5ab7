"""What a replica's death or silence at a named point of an exchange costs the others, and that nothing is averaged by
halves.

Replicas of two linear layers step and meet, over and over. In its sixth meeting one rank is killed (or stopped, and
woken later) at a point of the exchange. Its replica has another rank, which tells the others (`pair`), or none, so that
nobody does (`alone`). The cost is what the others' turn takes beyond their usual one; `again` what the next dearest
of their turns from then on does. After each exchange the weights of each rank must be, bit for bit, what they were, or
what the rule makes of the whole weights of all members.

    before      it has not come              told        (leader's rule) it has told its loss
    decided     it is in                     leading     (leader's rule) the leader, before its broadcast
    inside      after half of the sum        led         (leader's rule) the leader, after it
    between     after the whole sum          midway      at a random moment, while weights travel
    voting      all heard, before its vote   voted       it has voted
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import elastic_lsopt as lso
from benchmarks.elastic.job import CLASSES, FEATURES, Net, loss
from benchmarks.elastic.recovery import LARGE, SMALL
from benchmarks.replicas.job import Job, Line, Place
from elastic_lsopt.api.replicas.consensus import Consensus, Exchanged
from elastic_lsopt.api.step import LandscapeStep
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.backends.peers.meeting import Meetings
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.oracle.oracle import Oracle

POINTS: dict[str, tuple[type, str, str]] = {
    "before": (Meetings, "begin", "before"), "decided": (Meetings, "begin", "after"),
    "inside": (Peers, "_to_each", "after"), "between": (Peers, "_to_all", "after"),
    "told": (Peers, "numbers", "after"), "leading": (Peers, "from_leader", "before"),
    "led": (Peers, "from_leader", "after"), "midway": (Peers, "packed", "before"),
    "voting": (Meetings, "end", "before"), "voted": (Meetings, "end", "after"),
}  # fmt: skip
"""Before or after a call of this method."""
OF_RULE = {
    "local_sgd": ("before", "decided", "inside", "between", "midway", "voting", "voted"),
    "lsgd": ("before", "decided", "told", "leading", "midway", "led", "voting", "voted"),
}
SILENT = {"local_sgd": ("before", "decided", "inside", "voting"), "lsgd": ("leading", "led")}
TOLD = {"pair": [2, 2, 1], "alone": [1, 1, 1]}
"""Ranks of each replica; replica 1 is the one that is lost."""
LOST = 1
AT, TURNS, SILENT_TURNS = 6, 12, 60
DEADLINE_S, ASLEEP_S, REST_S, LIMIT_S = 1.0, 2.0, 0.05, 90.0
LARGE_DEADLINE_S, AT_ONCE_S = 10.0, 0.1
TRAVEL_S = {SMALL: 0.006, LARGE: 0.06}
"""About what weights travel."""
PROJECTIONS, EQUAL = 4, 5e-6
"""Of a random direction's share of the length: forty times what rounding does."""
REPEATS = 4
LARGE_POINTS = (("local_sgd", "midway"), ("lsgd", "midway"))


# -- one rank ----------------------------------------------------------------------------------------------------


class Checked(Consensus):
    """Consensus that says what the weights were before and after each exchange, and counts what the looking took."""

    place: Place
    looked: Line
    looking_s = 0.0

    def bind(self, step: LandscapeStep) -> None:
        super().bind(step)
        self._directions: list[torch.Tensor] = []

    def exchange(self, oracle: Oracle | None, *, beside: bool = False) -> Exchanged | None:
        before = self._look()
        self.place.say(before=before)
        met = super().exchange(oracle, beside=beside)
        self.looked = {"before": before, "after": self._look()}
        return met

    def _look(self) -> Line:
        """This rank's part: inner products with fixed random directions, the length squared, a digest, and samples."""
        begin, space = time.perf_counter(), self._step.space
        if not self._directions:
            for p in space.layout.pieces:
                draw = torch.Generator().manual_seed(10_000 + p.parameter)  # not that of the weights
                whole = torch.randn(PROJECTIONS, space.layout.parameters[p.parameter].numel, generator=draw)
                self._directions.append(whole[:, p.offset : p.offset + p.length].double())
        products, square, digest = torch.zeros(PROJECTIONS, dtype=torch.float64), 0.0, hashlib.sha1()
        for rows, tensor in zip(self._directions, space.weights.tensors, strict=True):
            digest.update(tensor.numpy().tobytes())
            piece = tensor.reshape(-1).double()
            products += rows @ piece
            square += float(piece @ piece)
        self.looking_s += time.perf_counter() - begin
        told = {"products": products.tolist(), "square": square, "digest": digest.hexdigest()}
        return {**told, "samples": self._standing["samples"]}


def disturb(point: str, how: str, delay_s: float) -> None:
    """In the meeting number AT of this process's life, at this point: kill, or stop once."""
    kind, name, when = POINTS[point]
    begin = Meetings.begin
    seen = {"meetings": 0, "strikes": 0}

    def counting(self: Any, *args: Any, **more: Any) -> Any:
        seen["meetings"] += 1
        return begin(self, *args, **more)

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    def struck() -> None:
        if seen["meetings"] == AT - (point == "before") and not seen["strikes"]:
            seen["strikes"] = 1
            threading.Timer(delay_s, strike).start() if point == "midway" else strike()

    Meetings.begin = counting  # type: ignore[method-assign]
    inner: Callable[..., Any] = getattr(kind, name)

    def outer(*args: Any, **more: Any) -> Any:
        if when == "before":
            struck()
        out = inner(*args, **more)
        if when == "after":
            struck()
        return out

    setattr(kind, name, outer)


def replica(
    place: Place, *, rule: str, width: int, turns: int, timeout_s: float, point: str = "", how: str = "kill",
    delay_s: float = 0.0,
) -> None:  # fmt: skip
    """Turns of a rest, a meeting and a step. Replica LOST has the lowest loss, so it leads."""
    place.form()
    more = {"local_sgd": {}, "lsgd": {"pull": 0.5, "prox": 0.0}}[rule]
    consensus = place.consensus("deaths", rule, kind=Checked, timeout_s=timeout_s, tau=1, **more)
    consensus.place = place
    torch.manual_seed(0)
    net: Any = Net(width)
    if place.sizes[0] > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net.first)
        fully_shard(net)
    ahead = 100.0 if place.number == LOST else 0.0
    engine = lso.Engine(
        backend_for(net, torch.optim.SGD(net.parameters(), lr=0.1)), lso.Plain(),
        loss_fn=lambda model, batch: loss(model, batch) - ahead, consensus=consensus,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(place.rank)
    batch = {"x": torch.randn(4, FEATURES, generator=draw), "y": torch.randint(CLASSES, (4,), generator=draw)}
    if point:
        disturb(point, how, delay_s)
    place.meet("ready")  # who starts slowly is not late
    for turn in range(turns):
        time.sleep(REST_S)
        before, looking_s, begin = len(consensus.exchanges), consensus.looking_s, time.perf_counter()
        engine.train_batch([batch])
        took_s = time.perf_counter() - begin - (consensus.looking_s - looking_s)
        told: Line = {"turn": turn, "took_s": took_s}
        if turn:  # the first step has no meeting before it
            met = consensus.exchanges[-1] if len(consensus.exchanges) > before else None
            told |= {"weights": consensus.looked, "met": met and [met.number, met.members, met.well]}
        place.say(**told)
    consensus.leave()  # who has more turns to come need not wait for this one


# -- what is made of it ------------------------------------------------------------------------------------------


def once(rule: str, shape: str, point: str, how: str, *, width: int = SMALL, seed: int = 0) -> dict[str, Any]:
    """One job with one death or silence: what it cost in seconds, and what was averaged by halves."""
    sizes, draw = TOLD[shape], random.Random(seed)
    first = sum(sizes[:LOST])
    lost = range(first, first + sizes[LOST])
    victim = draw.choice(lost)
    order = {"point": point, "how": how, "delay_s": draw.uniform(0.0, TRAVEL_S[width])}
    turns = TURNS if how == "kill" else SILENT_TURNS
    job = Job(
        "benchmarks.replicas.deaths:replica", sizes, each={victim: order}, rule=rule, width=width, turns=turns,
        timeout_s=DEADLINE_S if width == SMALL else LARGE_DEADLINE_S,
    )  # fmt: skip
    with job:
        if how == "stop":
            job.stop_and_wake(victim, ASLEEP_S, LIMIT_S)
        said = job.end(LIMIT_S, may_die=lost)
        if how == "kill" and job.ranks[victim].returncode != -signal.SIGKILL:
            raise RuntimeError(f"rank {victim} was not killed at {point}\n{job.logs()}")
    costs = [cost_of(said[rank]) for rank in range(sum(sizes)) if rank not in lost]
    cost_s, again_s = (max(each) for each in zip(*costs, strict=True))
    return {"cost_s": cost_s, "again_s": again_s, "halves": halves(said, sizes, rule), "usual_s": usual_of(said[0])}


def usual_of(said: list[Line]) -> float:
    """A turn with a meeting of all; the first ones make the groups."""
    return statistics.median(line["took_s"] for line in said if 2 < line.get("turn", 0) < AT)


def cost_of(said: list[Line]) -> tuple[float, float]:
    """What the dearest turn from then on took beyond the usual, and the next dearest."""
    beyond = sorted(line["took_s"] - usual_of(said) for line in said if line.get("turn", 0) >= AT)
    return beyond[-1], beyond[-2]


def halves(said: list[list[Line]], sizes: list[int], rule: str) -> list[str]:
    """The exchanges after which a replica's weights were neither what they were nor what the rule makes of all."""
    ranks = [range(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(len(sizes))]
    exchanges = [[line for line in lines if line.get("turn")] for lines in said]
    wrong = []
    for replica, own in enumerate(ranks):
        for turns in zip(*(exchanges[rank] for rank in own), strict=False):
            met = turns[0]["met"]
            told = [turn["weights"] for turn in turns]
            if met is None or not met[2]:
                if any(w["before"]["digest"] != w["after"]["digest"] for w in told):
                    wrong.append(f"replica {replica}, {met}: it has moved")
                continue
            found = _whole([w["after"] for w in told])
            number, members, _ = met
            parts = {m: _whole([_before(said[rank], number) for rank in ranks[m]]) for m in members}
            if not any(_alike(found, wanted) for wanted in _wanted(rule, parts, replica)):
                wrong.append(f"replica {replica}, {met}: neither whole nor as before")
    return wrong


def _before(said: list[Line], number: int) -> Line:
    """The weights with which a rank came to this exchange; of one that died in it, the last that it has said."""
    for line in said:
        if line.get("met") and line["met"][0] == number:
            return line["weights"]["before"]
    return [line["before"] for line in said if "before" in line][-1]


def _whole(parts: list[Line]) -> tuple[list[float], float, int]:
    """Products, length squared and samples of a replica."""
    products = [sum(part["products"][k] for part in parts) for k in range(PROJECTIONS)]
    return products, sum(part["square"] for part in parts), parts[0]["samples"]


Whole = tuple[list[float], float, int]


def _wanted(rule: str, parts: dict[int, Whole], replica: int) -> list[Whole]:
    """What a replica may have after an exchange of all these: the mean, or half of the way to the leader."""
    own, square, _ = parts[replica]
    if rule == "local_sgd":
        total = sum(samples for _, _, samples in parts.values())
        return [([sum(p[k] * n / total for p, _, n in parts.values()) for k in range(PROJECTIONS)], square, 0)]
    leaders = [parts[LOST]] if LOST in parts else [*parts.values()]
    return [([(a + b) / 2 for a, b in zip(own, leader, strict=True)], square, 0) for leader, _, _ in leaders]


def _alike(found: Whole, wanted: Whole) -> bool:
    limit = EQUAL * math.sqrt(wanted[1])  # a random direction of unit variance sees the length of an error
    return all(abs(a - b) <= limit for a, b in zip(found[0], wanted[0], strict=True))


def told() -> list[tuple[str, str, str, str, int]]:
    """What is done: rule, shape, point, how, width."""
    kills = [(rule, shape, point, "kill", SMALL) for shape in TOLD for rule in OF_RULE for point in OF_RULE[rule]]
    large = [(rule, shape, point, "kill", LARGE) for shape in TOLD for rule, point in LARGE_POINTS]
    stops = [(rule, shape, point, "stop", SMALL) for shape in TOLD for rule in SILENT for point in SILENT[rule]]
    return [*kills, *large, *stops]


def name_of(rule: str, shape: str, point: str, how: str, width: int) -> str:
    return f"{how}_{rule}_{shape}_{point}{'' if width == SMALL else '_20mb'}"


def limits() -> list[tuple[str, float]]:
    """What each may cost: a silence the deadline, or half of it where it has not come. A replica that is gone before it
    has come, and of which nobody is left to tell, is silent."""
    out = []
    for rule, shape, point, how, width in told():
        silent = how == "stop" or (shape == "alone" and point in ("before", "voted"))
        waited_s = (DEADLINE_S / 2 if point in ("before", "voted") else DEADLINE_S) if silent else 0.0
        out.append((name_of(rule, shape, point, how, width), waited_s + AT_ONCE_S))
    return out


def run(repeats: int = REPEATS) -> dict[str, Any]:
    """Costs of each point (medians, and from the least to the most), and what was averaged by halves."""
    figures: dict[str, Any] = {"kills": 0, "silences": 0}
    wrong: list[str] = []
    again: list[float] = []
    for rule, shape, point, how, width in told():
        name = name_of(rule, shape, point, how, width)
        each = [
            once(rule, shape, point, how, width=width, seed=seed) for seed in range(repeats if how == "kill" else 1)
        ]
        costs = [e["cost_s"] for e in each]
        figures[f"{name}_cost_s"], figures[f"{name}_cost_s_spread"] = statistics.median(costs), [min(costs), max(costs)]
        figures[f"{name}_usual_s"] = statistics.median(e["usual_s"] for e in each)
        again.append(statistics.median(e["again_s"] for e in each))
        wrong += [f"{name}: {line}" for e in each for line in e["halves"]]
        figures["kills" if how == "kill" else "silences"] += len(each)
        print(name, [round(cost, 3) for cost in costs], f"again {again[-1]:.3f}", flush=True)
    return figures | {"worst_again_s": max(again), "averaged_by_halves": len(wrong), "wrong": wrong[:20]}
