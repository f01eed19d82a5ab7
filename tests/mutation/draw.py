"""Draw the mutants: the same number from each package, by a seed.

python -m tests.mutation.draw [--seed 0] [--per-package 10]

Those of mutants.json that can still be made stay; only what the code has outlived is drawn again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutation.contexts import ROOT
from tests.mutation.mistakes import mistakes

LIST = Path(__file__).parent / "mutants.json"
PACKAGES = ("space", "oracle", "optimizers", "backends", "checkpoint", "elastic")
NOT_ON_A_CPU = ("noise_triton.py",)


@dataclass(frozen=True)
class Mutant:
    """The `nth` line (from 0) of `path` that reads `before` reads `after` instead."""

    path: str
    nth: int
    before: str
    after: str

    @property
    def name(self) -> str:
        return f"{self.path}: {self.before.strip()}  ->  {self.after.strip()}"

    def line_in(self, source: str) -> int | None:
        """The number of its line, from 1; None where the text has no such line any more."""
        found = [i for i, line in enumerate(source.splitlines(), 1) if line == self.before]
        return found[self.nth] if self.nth < len(found) else None

    def stands_in(self, source: str) -> bool:
        """Whether it is still a mistake that can be made in this text."""
        line = self.line_in(source)
        return line is not None and any((line, self.after) == (m.line, m.after) for m in mistakes(source))


def read(path: Path = LIST) -> list[Mutant]:
    return [Mutant(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def draw(
    sources: Mapping[str, str],
    seed: int,
    per_package: int,
    kept: Iterable[Mutant] = (),
    packages: Iterable[str] = PACKAGES,
) -> list[Mutant]:
    """`per_package` mutants of each package, one a line; `sources` are texts by path below the package."""
    out = []
    for package in packages:
        prefix = f"elastic_lsopt/{package}/"
        mine = [m for m in kept if m.path.startswith(prefix) and m.stands_in(sources.get(m.path, ""))]
        mine = mine[:per_package]
        taken = {(m.path, m.before, m.nth) for m in mine}
        by_line: dict[tuple[str, int], list[str]] = {}
        for path, text in sorted(sources.items()):
            if path.startswith(prefix) and not path.endswith(NOT_ON_A_CPU):
                for mistake in mistakes(text):
                    by_line.setdefault((path, mistake.line), []).append(mistake.after)
        chooser = random.Random(f"{seed}/{package}")
        places = sorted(by_line)
        chooser.shuffle(places)
        for path, line in places:
            if len(mine) == per_package:
                break
            lines = sources[path].splitlines()
            before = lines[line - 1]
            nth = lines[: line - 1].count(before)
            after = chooser.choice(by_line[path, line])
            if (path, before, nth) not in taken:
                mine.append(Mutant(path, nth, before, after))
        out += mine
    return out


def sources(root: Path = ROOT) -> dict[str, str]:
    """The package's files by path below the root."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / "elastic_lsopt").rglob("*.py"))
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-package", type=int, default=10)
    asked = parser.parse_args(arguments)
    before = read()
    drawn = draw(sources(), asked.seed, asked.per_package, before)
    LIST.write_text(json.dumps([asdict(m) for m in drawn], indent=1) + "\n", encoding="utf-8")
    print(f"{len(drawn)} mutants, {len({*drawn} - {*before})} of them new, in {LIST.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
