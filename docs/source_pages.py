"""What the site shows of files that are not in docs/: the README is its front page, and each file or folder that a page
links to is a page below source/. So a page's links are relative paths, as a code host follows them.

A hook of mkdocs (see mkdocs.yml), not a part of the package.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
FRONT = "README.md"
LINK = re.compile(r"\]\((?![a-z]+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash"}
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the front page and what pages link to, whatever those link to included."""
    made = {FRONT}
    files.append(_generated(FRONT, config))
    pages = [FRONT, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None)]
    while pages:
        page = pages.pop()
        for target in _targets(page):
            if not target.startswith("docs/") and target not in made and (ROOT / target).exists():
                made.add(target)
                files.append(_generated(target, config))
                pages += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links by paths in the repository become links by places in the site."""
    home = _home(page.file.src_uri)
    if not home.endswith(".md"):
        return markdown  # the text of a source file

    def placed(link: re.Match[str]) -> str:
        place = posixpath.relpath(_place(_target(home, link["path"])), posixpath.dirname(page.file.src_uri) or ".")
        return f"]({place}{link['anchor'] or ''})"

    return LINK.sub(placed, markdown)


def _targets(page: str) -> set[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return {_target(page, link["path"]) for link in LINK.finditer(text)}


def _target(page: str, link: str) -> str:
    """The path in the repository of a link in the page with this path."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _place(path: str) -> str:
    """Where in the site the file or folder with this path in the repository is."""
    if path == FRONT:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _home(place: str) -> str:
    """`_place` backwards."""
    if place == "index.md":
        return FRONT
    if not place.startswith("source/"):
        return f"docs/{place}"
    path = place.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix("/index.md").removesuffix(".md")


def _generated(path: str, config: Any) -> File:
    file = ROOT / path
    if path.endswith(".md"):
        text = file.read_text(encoding="utf-8")
    elif file.is_dir():
        inside = (f for f in file.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        names = sorted(str(f.relative_to(file)) for f in inside)
        text = "\n".join([UNSEARCHED, f"# {path}/\n", *(f"- `{name}`" for name in names)])
    else:
        language = LANGUAGES.get(file.suffix, "text")
        text = f"{UNSEARCHED}# {path}\n\n``````{language}\n{file.read_text(encoding='utf-8')}\n``````\n"
    inclusion = InclusionLevel.INCLUDED if path == FRONT else InclusionLevel.NOT_IN_NAV
    return File.generated(config, _place(path), content=text, inclusion=inclusion)
