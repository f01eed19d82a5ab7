"""The reader of a page's blocks finds each where it stands, and loses none."""

from __future__ import annotations

import pytest

from tests.docs.blocks import Block, blocks_of_text, commands_of

pytestmark = pytest.mark.fast

TEXT = """# A page

Words, `code`:

```python
a = 1

    b = "```"
```

1. A list:

   ```yaml title="job.yaml"
   elastic:
     min_nodes: 2
   ```

Words:

    make test

    make lint
The end.
"""


def test_fenced_and_indented_blocks_are_found_with_their_lines() -> None:
    assert blocks_of_text(TEXT, "page.md") == [
        Block("page.md", 6, "python", 'a = 1\n\n    b = "```"\n'),
        Block("page.md", 14, "yaml", "elastic:\n  min_nodes: 2\n", "job.yaml"),
        Block("page.md", 20, "", "make test\n\nmake lint\n"),
    ]


def test_a_fence_that_is_not_closed_is_named() -> None:
    with pytest.raises(ValueError, match=r"^page.md:3: a fence"):
        blocks_of_text("Words\n\n```python\na = 1\n", "page.md")


def test_the_commands_of_a_piece_of_shell() -> None:
    shell = 'make test   # all of it\nA=1 torchrun -m x \\\n    "a b" key={a: 1} && ls | wc -l\n# only words\n'
    assert commands_of(shell) == [
        ["make", "test"], ["A=1", "torchrun", "-m", "x", "a b", "key={a:", "1}"], ["ls"], ["wc", "-l"],
    ]  # fmt: skip
