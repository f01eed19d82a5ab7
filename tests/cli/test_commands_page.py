"""The reference of the command line is the one that follows from the parsers."""

from __future__ import annotations

import re

import pytest

from elastic_lsopt.cli.main import main
from elastic_lsopt.cli.reference import PAGE, commands_text

pytestmark = pytest.mark.fast

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_is_fresh() -> None:
    assert commands_text() == TEXT, "run: make schema"


def test_each_command_has_what_its_help_has(capsys: pytest.CaptureFixture[str]) -> None:
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)^```bash", TEXT, re.M | re.S))
    assert len(sections) == 13
    for command, told in sections.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert {*re.findall(r"--[a-z]+[a-z-]*", shown)} - {"--help"} == {*re.findall(r"--[a-z]+[a-z-]*", told)}, command
