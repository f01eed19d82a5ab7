"""The blocks of code of a page of the documentation, for the tests that run them as they stand.

    program("docs/trainer.md")                 all Python of the page, one block after another
    commands("docs/plan.md")                   the words of each command in its shell blocks
    blocks("docs/data.md", "yaml", "jsonl")    the blocks in these languages, in their order

A page needs no line here: test_every_block.py runs or checks each block of each page, and names those pages whose
blocks a test of their own runs.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass

from tests.processes.warm import ROOT

PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")))
"""By their paths from the root."""
FENCED = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<more>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n|\n(?= {4}))+")


@dataclass(frozen=True)
class Block:
    """A fenced block of code; an indented one is a block without a language."""

    page: str
    line: int
    """Of the first line of its text, from 1."""
    language: str
    text: str
    title: str = ""
    """The file that a reader is to save it as; "" where none is named."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in their order: all, or those in these languages."""
    found = blocks_of_text((ROOT / page).read_text(encoding="utf-8"), page)
    return [block for block in found if not languages or block.language in languages]


def blocks_of_text(text: str, page: str) -> list[Block]:
    """The blocks of a page with this text. Raises ValueError for a fence that nothing closes."""
    found = [
        _block(page, text, match.start("text"), match["language"], match["text"], match["more"])
        for match in FENCED.finditer(text)
    ]
    rest = FENCED.sub(lambda match: re.sub(r"[^\n]+", "-", match[0]), text)  # the lines keep their numbers
    if lost := re.search(r"^ *```", rest, re.M):
        raise ValueError(f"{page}:{rest.count(chr(10), 0, lost.start()) + 1}: a fence that is not closed.")
    found += [_block(page, rest, match.start(), "", match[0]) for match in INDENTED.finditer(rest)]
    return sorted(found, key=lambda block: block.line)


def program(page: str) -> str:
    """All Python of a page, one block after another."""
    return "\n".join(block.text for block in blocks(page, "python"))


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page's `bash` blocks, in their order."""
    return [words for block in blocks(page, "bash") for words in commands_of(block.text)]


def commands_of(shell: str) -> list[list[str]]:
    r"""The words of each command: comments left out, split at `&&`, `;` and a pipe, lines joined at a `\`."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        parser = shlex.shlex(line, posix=True, punctuation_chars=True)
        parser.whitespace_split = True
        words: list[str] = []
        for word in [*parser, ";"]:
            if word in ("&&", ";", "|", "&"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def _block(page: str, text: str, begin: int, language: str, code: str, more: str = "") -> Block:
    title = re.search(r'title="([^"]*)"', more)
    return Block(page, text.count("\n", 0, begin) + 1, language, textwrap.dedent(code), title[1] if title else "")
