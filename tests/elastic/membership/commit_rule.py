"""The workers' commit rule as a small abstract model: versions, mirrors, C and S*.

Each worker is one rank on a node of its own; `act` is its next step, taken whenever the caller likes. A step of
training is an all-reduce that every rank of the generation must enter, and that each leaves by itself, so some may have
seen its result when others die. Loss of a rank together with its mirror is loss of a shard: then, and only then, may S*
lie below what was committed (the job goes on from its checkpoint, step 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LAGS = 2
"""Versions that may be on their way to the mirror."""

Stamp = tuple[int, int]
"""(generation, step) of a version."""
Copy = tuple[int, int, int]
"""(generation, step, rank): one shard of a version."""


class RuleBroken(AssertionError):
    """The commit rule broke an invariant."""


class Trainer(NamedTuple):
    """A living worker: what it does now in which generation, and what it holds."""

    name: str
    generation: int = 0
    phase: str = "wait"
    """wait, report, fill, settle, barrier, train or reduce."""
    step: int = 0
    holds: frozenset[Copy] = frozenset()
    sent: int = -1
    """Its newest version of this generation that its mirror has."""


class Rule(NamedTuple):
    """How C is made, and when old versions are dropped; other values are broken on purpose."""

    smallest: bool = True
    """C is the smallest acknowledged version, not the largest."""
    keep_until_mirrored: bool = True
    """Versions of older generations are dropped after the barrier, not before."""


class Job(NamedTuple):
    """All living workers, and what was said in each generation's collectives."""

    trainers: tuple[Trainer, ...] = ()
    ranks: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """The workers of each generation that was entered, by rank."""
    reports: frozenset[tuple[int, str, frozenset[Copy]]] = frozenset()
    chosen: tuple[tuple[int, Stamp], ...] = ()
    settled: frozenset[tuple[int, str]] = frozenset()
    reduced: frozenset[tuple[int, int, int, int]] = frozenset()
    """(generation, step, rank, acknowledged step) of each entry into a step's all-reduce."""
    committed: Stamp = (0, 0)
    """The newest version that any worker has ever taken for committed."""
    base: Stamp = (0, 0)
    """The newest generation that has chosen S*, and the step after which its samples are its own."""
    lost: int = 0
    """How often a shard was lost."""
    rule: Rule = Rule()

    # Membership. -----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Trainer | None:
        return next((t for t in self.trainers if t.name == name), None)

    def living(self, names: Iterable[str]) -> Job:
        """Exactly these are alive: others are killed with all that they hold, new ones hold nothing."""
        alive = sorted(names)
        if [t.name for t in self.trainers] == alive:
            return self
        return self._replace(trainers=tuple(self.get(n) or Trainer(n) for n in alive))._forget()

    def enter(self, name: str, generation: int, ranks: tuple[str, ...], *, running: bool = True) -> Job:
        """The worker's agent tells of a generation: it leaves the older one at once, and keeps its versions."""
        trainer = self.get(name)
        if trainer is None or trainer.generation >= generation:
            return self
        known = dict(self.ranks)
        assert known.setdefault(generation, ranks) == ranks
        phase = "report" if running and name in ranks else "wait"
        job = self._replace(ranks=tuple(sorted(known.items())))
        return job._with(trainer._replace(generation=generation, phase=phase, sent=-1))._forget()

    # Work. -----------------------------------------------------------------------------------------------------------

    def act(self, name: str) -> Job:
        """The next thing that this worker does; the same job where it must wait."""
        trainer = self.get(name)
        if trainer is None or trainer.phase == "wait":
            return self
        return getattr(self, f"_{trainer.phase}")(trainer)

    def push(self, name: str) -> Job:
        """The mirror, the next rank, has received this worker's newest version of the generation."""
        t = self.get(name)
        if t is None or t.phase in ("wait", "report", "fill") or t.sent >= t.step:
            return self
        ranks = self._ranks(t)
        mirror = self.get(ranks[(ranks.index(name) + 1) % len(ranks)])
        if mirror is None or mirror.generation != t.generation or mirror.phase in ("wait", "report", "fill"):
            return self
        copies = {c for c in t.holds if c[0] == t.generation and c[1] > t.sent and c[2] == ranks.index(name)}
        job = self._with(t._replace(sent=t.step))
        mirror = job.get(mirror.name)
        assert mirror is not None
        return job._with(mirror._replace(holds=mirror.holds | copies))

    def _report(self, t: Trainer) -> Job:
        job = self._replace(reports=self.reports | {(t.generation, t.name, t.holds)})
        return job._with(t._replace(phase="fill"))

    def _fill(self, t: Trainer) -> Job:
        """When all have reported, all choose the same S* and pull what they lack."""
        reports = [(n, holds) for g, n, holds in self.reports if g == t.generation]
        ranks, job = self._ranks(t), self
        if len(reports) < len(ranks) or not self._all_in(t.generation):
            return self
        if t.generation not in dict(self.chosen):
            held = frozenset().union(*(holds for _, holds in reports))
            job = self._choose(t.generation, held)
        step = dict(job.chosen)[t.generation][1]
        kept = t.holds if self.rule.keep_until_mirrored else frozenset[Copy]()
        own = (t.generation, step, ranks.index(t.name))
        return job._with(t._replace(phase="settle", step=step, holds=kept | {own}))

    def _choose(self, generation: int, held: frozenset[Copy]) -> Job:
        """S*: the newest version of which every shard is held."""
        sizes = {g: len(ranks) for g, ranks in self.ranks}
        whole = [s for s in {c[:2] for c in held} if all((*s, r) in held for r in range(sizes[s[0]]))]
        best, job = max(whole, default=(0, 0)), self
        own_from = max(best[1], self.committed[1])
        if best < self.committed:
            ranks = dict(self.ranks)[self.committed[0]]
            here = {n for g, n, _ in self.reports if g == generation}
            if all(ranks[r] in here or ranks[(r + 1) % len(ranks)] in here for r in range(len(ranks))):
                raise RuleBroken(
                    f"generation {generation} goes on from {best} below C={self.committed}: it was dropped"
                )
            job = self._replace(committed=best, lost=self.lost + 1)
        elif best[1] < self.committed[1]:
            raise RuleBroken(f"step {self.committed[1]} was committed and is done again from {best}")
        base = max(self.base, (generation, own_from))
        return job._replace(chosen=(*job.chosen, (generation, best)), base=base)

    def _settle(self, t: Trainer) -> Job:
        """Mirrored, and holding its mirrored peer's version: ready for the barrier."""
        if self._acknowledged(t) < t.step:
            return self
        job = self._replace(settled=self.settled | {(t.generation, t.name)})
        return job._with(t._replace(phase="barrier"))

    def _barrier(self, t: Trainer) -> Job:
        if sum(g == t.generation for g, _ in self.settled) < len(self._ranks(t)):
            return self
        holds = frozenset(c for c in t.holds if c[0] == t.generation)
        return self._commit((t.generation, t.step))._with(t._replace(phase="train", holds=holds))

    def _train(self, t: Trainer) -> Job:
        acknowledged = self._acknowledged(t)
        if t.step - acknowledged >= LAGS:
            return self
        entry = (t.generation, t.step + 1, self._ranks(t).index(t.name), acknowledged)
        return self._replace(reduced=self.reduced | {entry})._with(t._replace(phase="reduce"))

    def _reduce(self, t: Trainer) -> Job:
        """The all-reduce ends for me: C, and a new version."""
        known = [a for g, s, _, a in self.reduced if (g, s) == (t.generation, t.step + 1)]
        ranks = self._ranks(t)
        if len(known) < len(ranks):
            return self
        c = min(known) if self.rule.smallest else max(known)
        holds = {x for x in t.holds if x[0] != t.generation or x[1] >= c}
        own = (t.generation, t.step + 1, ranks.index(t.name))
        after = t._replace(phase="train", step=t.step + 1, holds=frozenset({*holds, own}))
        return self._commit((t.generation, c))._with(after)

    def _commit(self, stamp: Stamp) -> Job:
        """Samples up to this step count from now on: in one generation only, so each of them once."""
        if stamp[0] < self.base[0] and stamp[1] > self.base[1]:
            raise RuleBroken(f"generation {stamp[0]} commits step {stamp[1]}; generation {self.base[0]} does so too")
        return self._replace(committed=max(self.committed, stamp))

    # Bookkeeping. ----------------------------------------------------------------------------------------------------

    def _ranks(self, t: Trainer) -> tuple[str, ...]:
        return dict(self.ranks)[t.generation]

    def _all_in(self, generation: int) -> bool:
        trainers = [self.get(n) for n in dict(self.ranks)[generation]]
        return all(t is not None and t.generation == generation for t in trainers)

    def _acknowledged(self, t: Trainer) -> int:
        """The newest step of which my mirror holds my shard, and I my mirrored peer's."""
        ranks = self._ranks(t)
        mirrored_peer = (ranks.index(t.name) - 1) % len(ranks)
        mine = max((s for g, s, r in t.holds if (g, r) == (t.generation, mirrored_peer)), default=-1)
        return min(t.sent, mine) if len(ranks) > 1 else t.step

    def _forget(self) -> Job:
        """What was said in the collectives of a generation matters while somebody is in it."""
        here = {t.generation for t in self.trainers}
        return self._replace(
            reports=frozenset(x for x in self.reports if x[0] in here),
            chosen=tuple(x for x in self.chosen if x[0] in here),
            settled=frozenset(x for x in self.settled if x[0] in here),
            reduced=frozenset(x for x in self.reduced if x[0] in here),
        )

    def _with(self, trainer: Trainer) -> Job:
        return self._replace(trainers=tuple(trainer if t.name == trainer.name else t for t in self.trainers))
