"""The page: pictures, sentences and tables in one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from elastic_lsopt.report.answers import failures, heading, keys, summary
from elastic_lsopt.report.pictures.draw_study import ranking
from elastic_lsopt.report.run import Run, number
from elastic_lsopt.report.sections import CAVEAT, Section
from elastic_lsopt.report.table import final_values

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.3rem; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
a { color: #2f5f94; }
figure { margin: 0; }
img { max-width: 100%; height: auto; }
figcaption, .quiet { color: #555; font-size: 0.9rem; }
.caveat { border-left: 5px solid #ee6677; background: #fdf0f1; padding: 0.6rem 1rem; margin: 1.2rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


@dataclass(frozen=True)
class Picture:
    """A section that was drawn."""

    section: Section
    path: Path
    words: str
    """What it shows, in words."""
    probe: str | None = None
    """Whose it is, where the probe is not named by its measure."""

    @property
    def key(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        return self.section.title if self.probe is None else f"{self.section.title}: {self.probe}"


def page(run: Run, pictures: Sequence[Picture], missing: Sequence[str], of_answers: Sequence[Sequence[Picture]]) -> str:
    """The whole document, `of_answers` the pictures of each of the run's answers; every text from it is escaped."""
    tables = [("values", "Final values", _values(run)), ("tau", "Ranking in numbers", _ranks(run))]
    tables = [(key, title, body) for key, title, body in tables if body]
    links = [(p.key, p.title) for p in pictures] + [(key, title) for key, title, _ in tables]
    answers = list(zip(keys(run), run.answers, of_answers, strict=True))
    links += [(key, heading(answer)) for key, answer, _ in answers]
    body = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="quiet">{escape(_summary(run))}</p>',
        f'<div class="caveat" role="note" id="caveat"><strong>Before you read on.</strong> {escape(CAVEAT)}</div>',
        "<nav>" + " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in links) + "</nav>",
        *(_picture(picture) for picture in pictures),
        *(f'<section id="{key}"><h2>{escape(title)}</h2>{table}</section>' for key, title, table in tables),
        *(_answer(key, answer, drawn) for key, answer, drawn in answers),
    ]
    if missing:
        lines = "".join(f"<li>{escape(line)}</li>" for line in missing)
        body.append(f'<section id="missing"><h2>Not in this run</h2><ul class="quiet">{lines}</ul></section>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _answer(key: str, answer: Run, pictures: Sequence[Picture]) -> str:
    """One answer of `elastic-lsopt probe` under a heading of its own."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in failures(answer))
    failed = f'<p class="quiet">Not measured:</p><ul class="quiet">{lines}</ul>' if lines else ""
    drawn = "\n".join(_picture(picture, level=3) for picture in pictures)
    return (
        f'<section id="{key}"><h2>{escape(heading(answer))}</h2>\n<p class="quiet">{escape(summary(answer))}</p>\n'
        f"{_values(answer)}{failed}{drawn}</section>"
    )


def _picture(picture: Picture, level: int = 2) -> str:
    section, data = picture.section, base64.b64encode(picture.path.read_bytes()).decode("ascii")
    alt = escape(f"{picture.title}. {picture.words}".strip(), quote=True)
    return (
        f'<section id="{picture.key}"><h{level}>{escape(picture.title)}</h{level}>\n<p>{escape(section.meaning)}</p>\n'
        f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">\n'
        f"<figcaption>{escape(picture.words)}</figcaption></figure></section>"
    )


def _summary(run: Run) -> str:
    """The run in a line."""
    said = []
    if run.rows:
        last = run.rows[-1]
        said.append(f"{last['step']:,} steps")
        for key, text in (
            ("samples", "{:,.0f} samples"), ("world", "world {:.0f} at the end"), ("batch", "batch {:,.0f}"),
            ("loss", "last training loss {:.4f} nats"),
        ):  # fmt: skip
            if not math.isnan(value := number(last.get(key))):
                said.append(text.format(value))
    if run.replicas:
        said.append(f"{1 + len(run.replicas)} replicas")
    if run.finished is not None:
        said.append(f"probes of the finished model {run.finished.get('model') or ''}".rstrip())
    if run.answers:
        said.append(f"answers of elastic-lsopt probe: {len(run.answers)}")
    if run.study is not None:
        models = run.study.get("models")
        said.append(f"a study of {len(models) if isinstance(models, list) else 0} models")
    if run.comparison is not None:
        said.append("a comparison of methods")
    return " · ".join(said)


def _values(run: Run) -> str:
    lines = [
        [
            line.title, number_cell(line.value), number_cell(line.error), line.unit, line.when, line.work,
            number_cell(line.seconds), line.meaning,
        ]
        for line in final_values(run)
    ]  # fmt: skip
    return _table(("value of", "value", "± error", "unit", "when", "work", "seconds", "what it says"), lines)


def _ranks(run: Run) -> str:
    lines = [
        [
            rank.name, *(number_cell(v) for v in (rank.tau, rank.low, rank.high)), str(rank.models or ""),
            number_cell(rank.granulated), number_cell(rank.loss_gap),
        ]
        for rank in ranking(run)
    ]  # fmt: skip
    head = ("measure", "Kendall's τ", "interval from", "to", "models", "Ψ, within one setting", "τ with the loss gap")
    return _table(head, lines)


class Markup(str):
    """HTML of our own, which is not escaped again."""


def number_cell(value: float) -> Markup:
    """A number as people read it, with all its digits for machines; a dash where there is none."""
    return Markup("–" if math.isnan(value) else f'<data value="{value!r}">{value:.5g}</data>')


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Nothing where there are no lines."""
    body = "".join("<tr>" + "".join(map(_cell, line)) + "</tr>\n" for line in lines)
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    table = f"<table><thead><tr>{columns}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return f'<div class="wide">{table}</div>' if body else ""


def _cell(text: str) -> str:
    return f'<td class="number">{text}</td>' if isinstance(text, Markup) else f"<td>{escape(text)}</td>"
