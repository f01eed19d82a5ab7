"""Writes a run's report: pictures/*.png and report.html in its folder. No torch, no processes, no network."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from elastic_lsopt.errors import UserError
from elastic_lsopt.report.answers import keys
from elastic_lsopt.report.html import Picture, page
from elastic_lsopt.report.run import Run
from elastic_lsopt.report.sections import SECTIONS, Section
from elastic_lsopt.report.table import final_values

PAGE, PICTURES = "report.html", "pictures"


def write_report(folder: Path, run: Run) -> list[Path]:
    """Draw all that the run has; returns the files written, the page first.

    The answers of `elastic-lsopt probe` follow, each with pictures of its own. A picture of an earlier report that
    this run has no longer goes. Raises UserError where there is nothing to draw or the folder cannot be written.
    """
    try:
        (folder / PICTURES).mkdir(exist_ok=True)
        pictures = _all_drawn(run, folder / PICTURES, "")
        of_answers = [
            _all_drawn(answer, folder / PICTURES, f"{key}-") for key, answer in zip(keys(run), run.answers, strict=True)
        ]
        written = [picture for drawn in (pictures, *of_answers) for picture in drawn]
        _take_old_away(folder / PICTURES, {picture.path for picture in written})
        if not written and not run.answers and not final_values(run):
            with suppress(OSError):
                (folder / PICTURES).rmdir()
            raise UserError(
                f"{folder} holds nothing to draw: no losses and no probes; add `probes:` to the job, or run "
                "`elastic-lsopt probe` on its model."
            )
        seen = {picture.section.key for picture in written}
        missing = [how_to_get(s, run) for s in SECTIONS if s.probe and _has(run, s) and s.key not in seen]
        unfinished = folder / f"{PAGE}.unfinished"
        text = page(run, pictures, missing, of_answers)
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, folder / PAGE)  # a reader never meets half a page
    except OSError as error:
        raise UserError(
            f"the report in {folder} cannot be written: {error.strerror}; make room, or copy it."
        ) from error
    return [folder / PAGE, *(picture.path for picture in written)]


def _has(run: Run, section: Section) -> bool:
    """Whether the folder holds what the section is of."""
    return {
        "rows": bool(run.rows), "probes": bool(run.rows or run.finished), "study": run.study is not None,
        "comparison": run.comparison is not None,
    }[section.of]  # fmt: skip


def _all_drawn(run: Run, folder: Path, before: str) -> list[Picture]:
    """The run's pictures in order, in files whose names begin with `before`."""
    return [p for section in SECTIONS if _has(run, section) for p in _drawn(section, run, folder, before)]


def _take_old_away(folder: Path, written: Collection[Path]) -> None:
    """The pictures of an earlier report that this one has not drawn; what others have put there stays."""
    ours = "|".join(section.key for section in SECTIONS)
    for old in folder.glob("*.png"):
        if old not in written and re.fullmatch(rf"(answer-\d+-)?({ours})(-\d+)?", old.stem):
            old.unlink(missing_ok=True)


def _drawn(section: Section, run: Run, folder: Path, before: str) -> list[Picture]:
    """The section's picture, and one more for each probe of its measures that has a name of its own."""
    found = []
    target = folder / f"{before}{section.key}.png"
    if (words := section.draw(run, target)) is not None:
        found.append(Picture(section, target, words))
    others = [name for name in run.names() if run.measure_of(name) in section.kinds and name in run.measures]
    for i, name in enumerate(others):
        target = folder / f"{before}{section.key}-{i + 1}.png"
        if (words := section.draw(run.alone(name), target)) is not None:
            found.append(Picture(section, target, words, name))
    return found


def how_to_get(section: Section, run: Run) -> str:
    """The line of the page for a picture that is missing."""
    what = f"no {section.title[0].lower()}{section.title[1:]} in this run"
    if not run.rows or section.asks is not None:
        return f"{what}: elastic-lsopt probe … --measures {' '.join(filter(None, (section.probe, section.asks)))}"
    return f"{what}: add probes: {{{section.probe}: …}} to its YAML"
