"""A page of the documentation, followed from top to bottom in an empty folder, as a newcomer copies it.

A block with a title is a file to save (a title that comes again is the same file, further down); a block of `bash` is
typed, each command to its end; Python without a title is a program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import Block, blocks, commands_of
from tests.processes.ranks import free_port, rank_environment
from tests.processes.warm import BIN, run

LIMIT_S = 240.0
"""Of a command: against one that hangs."""
TYPED = ("elastic-lsopt", "python", "torchrun", "deepspeed", "pip")
"""The programs that pages may ask a reader to type."""


@dataclass(frozen=True)
class Typed:
    """A command as it was typed, and all that it printed."""

    words: list[str]
    output: str


def follow(page: str, folder: Path, wanted: Callable[[Block], bool] = lambda block: True) -> list[Typed]:
    """Do what the wanted blocks of a page say; the commands and programs in their order. Fails with the output of one
    that does not end with 0."""
    told = []
    for block in filter(wanted, blocks(page)):
        if block.title:
            with (folder / block.title).open("a", encoding="utf-8") as out:
                out.write(block.text if not out.tell() else f"\n\n{block.text}")
        elif block.language == "bash":
            told += [_typed(block, words, folder) for words in commands_of(block.text)]
        elif block.language == "python":
            told.append(_typed(block, ["python", "-c", block.text], folder))
    return told


def _typed(block: Block, words: list[str], folder: Path) -> Typed:
    given = [word for word in words]
    variables: dict[str, str] = {}
    while "=" in given[0]:
        name, _, variables[name] = given.pop(0).partition("=")
    assert given[0] in TYPED, f"{block}: {given[0]} is no program that a page may ask for"
    program = [str(BIN / given[0])] if given[0] != "python" else [sys.executable]
    if given[0] == "deepspeed":  # its own port is one for all jobs of a machine
        program.append(f"--master_port={free_port()}")
    environment = rank_environment(PATH=f"{BIN}:{os.environ['PATH']}", **variables)
    done = run([*program, *given[1:]], cwd=folder, env=environment, timeout=LIMIT_S)
    assert done.returncode == 0, f"{block}: {words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return Typed(words, done.stdout + done.stderr)
