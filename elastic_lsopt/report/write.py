"""Writes a run's report: pictures/*.png and report.html in its folder. No torch, no processes, no network."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from elastic_lsopt.errors import UserError
from elastic_lsopt.report.html import Picture, page
from elastic_lsopt.report.run import Run
from elastic_lsopt.report.sections import SECTIONS, Section
from elastic_lsopt.report.table import final_values

PAGE, PICTURES = "report.html", "pictures"


def write_report(folder: Path, run: Run) -> list[Path]:
    """Draw all that the run has; returns the files written, the page first.

    A picture of an earlier report that this run has no longer goes. Raises UserError where there is nothing to draw
    or the folder cannot be written.
    """
    there = {"rows": bool(run.rows), "probes": bool(run.rows or run.finished), "study": run.study is not None}
    pictures: list[Picture] = []
    missing: list[str] = []
    try:
        (folder / PICTURES).mkdir(exist_ok=True)
        for section in SECTIONS:
            drawn = _drawn(section, run, folder / PICTURES) if there[section.of] else []
            pictures += drawn
            if not drawn and there[section.of] and section.probe is not None:
                missing.append(how_to_get(section, run))
            for old in [folder / PICTURES / f"{section.key}.png", *(folder / PICTURES).glob(f"{section.key}-*.png")]:
                if old not in [picture.path for picture in drawn]:
                    old.unlink(missing_ok=True)
        if not pictures and not final_values(run):
            with suppress(OSError):
                (folder / PICTURES).rmdir()
            raise UserError(
                f"{folder} holds nothing to draw: no losses and no probes; add `probes:` to the job, or run "
                "`elastic-lsopt probe` on its model."
            )
        unfinished = folder / f"{PAGE}.unfinished"
        unfinished.write_text(page(run, pictures, missing), encoding="utf-8", errors="replace")
        os.replace(unfinished, folder / PAGE)  # a reader never meets half a page
    except OSError as error:
        raise UserError(
            f"the report in {folder} cannot be written: {error.strerror}; make room, or copy it."
        ) from error
    return [folder / PAGE, *(picture.path for picture in pictures)]


def _drawn(section: Section, run: Run, folder: Path) -> list[Picture]:
    """The section's picture, and one more for each probe of its measures that has a name of its own."""
    found = []
    target = folder / f"{section.key}.png"
    if (words := section.draw(run, target)) is not None:
        found.append(Picture(section, target, words))
    others = [name for name in run.names() if run.measure_of(name) in section.kinds and name in run.measures]
    for i, name in enumerate(others):
        target = folder / f"{section.key}-{i + 1}.png"
        if (words := section.draw(run.alone(name), target)) is not None:
            found.append(Picture(section, target, words, name))
    return found


def how_to_get(section: Section, run: Run) -> str:
    """The line of the page for a picture that is missing."""
    what = f"no {section.title[0].lower()}{section.title[1:]} in this run"
    if not run.rows or section.asks is not None:
        return f"{what}: elastic-lsopt probe … --measures {' '.join(filter(None, (section.probe, section.asks)))}"
    return f"{what}: add probes: {{{section.probe}: …}} to its YAML"
