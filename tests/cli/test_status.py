"""`elastic-lsopt status`: from any node, after the host's death, after the end."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.status import table
from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import BIN, TINY, Started, rows, run, write_job
from tests.processes.ranks import free_port

LIMIT = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Started]]]:
    """A job of two nodes that outlasts the tests, and its nodes."""
    folder = tmp_path_factory.mktemp("status")
    elastic = {"endpoint": f"127.0.0.1:{free_port()}", "min_nodes": 1, "lease_s": 2.5}
    job = write_job(
        folder / "run.yaml", model={"import": TINY, "args": {"pause_s": 0.2}}, workers=1, max_steps=4000,
        eval_steps=None, save_steps=None, elastic=elastic,
    )  # fmt: skip
    nodes: dict[str, Started] = {}
    for name in ("n1", "n2", "n3"):
        command = ["env", f"ELASTIC_LSOPT_NODE={name}", str(BIN / "elastic-lsopt"), "train", str(job)]
        nodes[name] = Started(command, folder)
    nodes["n1"].until(lambda: len(_nodes(folder / "run")) == 3 and max(rows(folder / "run"), default=0) >= 3)
    yield folder / "run", nodes
    for node in nodes.values():
        node.kill()


def status(folder: Path, *more: str, code: int = 0) -> str:
    return run([str(BIN / "elastic-lsopt"), "status", str(folder), "--once", *more], folder.parent, code=code)


def status_once(reached: Callable[[str], bool], folder: Path, *more: str) -> str:
    """The status when it says that: an agent says anew what it knows every half second, or less often."""
    end = time.monotonic() + 60
    while not reached(said := status(folder, *more)) and time.monotonic() < end:
        time.sleep(0.1)
    return said


@LIMIT
def test_each_node_tells_of_all(running: tuple[Path, dict[str, Started]]) -> None:
    """Each node's own store is asked, and sends on to the host's, which knows all."""
    folder, _ = running
    files = sorted((folder / "elastic").glob("*.address"))
    assert len(files) == 3
    wanted = [r"generation \d+ · host n\d", *(rf"{name} .* \d+ +│" for name in ("n1", "n2", "n3")), "samples a second"]
    for file in files:
        said = status_once(
            lambda said: all(re.search(part, said) for part in wanted), folder, "--endpoint", file.read_text()
        )
        assert [part for part in wanted if not re.search(part, said)] == [], said
        assert "joined:" in said


@LIMIT
def test_when_the_host_has_died(running: tuple[Path, dict[str, Started]]) -> None:
    folder, nodes = running
    host = re.search(r"host (n\d)", status_once(lambda said: "· host n" in said, folder))
    assert host is not None
    nodes[host[1]].process.send_signal(signal.SIGKILL)
    nodes[host[1]].process.wait()
    other = next(node for name, node in nodes.items() if name != host[1])
    other.until(lambda: len(_nodes(folder)) == 2)
    said = status_once(lambda said: "· host n" in said and f"· host {host[1]}" not in said, folder)
    found = re.search(r"generation \d+ · host (n\d)", said)
    assert found is not None and found[1] != host[1], said
    assert f"silent: {host[1]}" in said, said


@LIMIT
def test_after_the_end(running: tuple[Path, dict[str, Started]]) -> None:
    """The journal still tells of the last changes, the run folder that nobody is left of what ran."""
    folder, nodes = running
    for node in nodes.values():
        node.kill()
    said = status(folder)
    assert "joined:" in said and "running after step" in said and "its process has gone" in " ".join(said.split()), said


def test_before_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "run/elastic").mkdir(parents=True)
    said = status(tmp_path / "run", code=2)
    assert said.startswith("elastic-lsopt: no agent of this job answers") and len(said.splitlines()) == 1, said


def test_no_run_folder(tmp_path: Path) -> None:
    assert "is no run folder" in status(tmp_path / "nothing", code=2)


def test_before_the_first_generation() -> None:
    told: dict[str, Any] = {"generation": None, "host_address": "127.0.0.1:1", "reports": {}}
    assert table(told, []) == "no generation yet; waiting for nodes at 127.0.0.1:1"


def _nodes(folder: Path) -> set[str]:
    changes = read_journal(folder)
    return set(changes[-1]["nodes"]) if changes else set()
