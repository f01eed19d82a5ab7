"""A cluster on one machine: agents as nodes, each a process of its own, that a driver starts, kills and watches."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.processes.ranks import ROOT, free_port, rank_environment
from tests.processes.warm import Popen

Row = dict[str, Any]


class Stuck(AssertionError):
    """Something did not happen in its time; the message holds every node's log."""


class Cluster:
    """Nodes of one job of tests/chaos/job.py; a context manager that ends all that it has started."""

    def __init__(
        self, folder: Path, *, backend: str, steps: int, slow_s: float, workers: int = 1, replicas: int = 1,
        **elastic: Any,
    ) -> None:  # fmt: skip
        self.folder, self.steps = folder, steps
        folder.mkdir(parents=True)
        self._endpoint = f"127.0.0.1:{free_port()}"
        settings = {
            "folder": str(folder), "backend": backend, "width": 16, "steps": steps, "slow_s": slow_s,
            "workers": workers, "replicas": replicas, "save_steps": 20,
            "elastic": {"endpoint": self._endpoint, **elastic},
        }  # fmt: skip
        self._settings = folder / "settings.json"
        self._settings.write_text(json.dumps(settings))
        self.nodes: dict[str, Popen] = {}
        self.codes: dict[str, int] = {}
        self._count = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.nodes.values():
            if process.poll() is None:
                process.kill()
            process.wait(timeout=20)
        for pid in self.workers().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- what a driver does ------------------------------------------------------------------------------------

    def start(self) -> str:
        """A new node; its name."""
        self._count += 1
        name = f"n{self._count}"
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.chaos.job", str(self._settings)], cwd=ROOT,
                env=rank_environment(ELASTIC_LSOPT_NODE=name), stdout=log, stderr=log,
            )  # fmt: skip
        return name

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def order(self, point: str, number: int) -> None:
        """The first worker that gets to `point` sends itself the signal."""
        draft = self.folder / f"draft-{point}"
        draft.write_text(str(int(number)))
        draft.rename(self.folder / f"at-{point}")

    def taken(self, point: str) -> bool:
        return not (self.folder / f"at-{point}").exists()

    def hurry(self) -> None:
        """From now on steps do not wait."""
        (self.folder / "hurry").touch()

    # -- what a driver sees ------------------------------------------------------------------------------------

    def living(self) -> list[str]:
        for name, process in list(self.nodes.items()):
            if (code := process.poll()) is not None:
                self.codes[name] = code
        return [name for name, process in self.nodes.items() if process.poll() is None]

    def workers(self) -> dict[str, int]:
        """Living worker processes of this job, whoever their parent is: name -> pid."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                if str(self._settings).encode() not in (entry / "cmdline").read_bytes():
                    continue
                for variable in (entry / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"ELASTIC_LSOPT_WORKER="):
                        found[variable.partition(b"=")[2].decode()] = int(entry.name)
        return found

    def changes(self) -> list[Row]:
        return read_journal(self.folder)

    def host(self) -> str | None:
        """The node that hosts the store, as any node's votes say."""
        return self._newest()[0]

    def voters(self) -> set[str]:
        """The members of the newest generation, with and without workers."""
        return set(self._newest()[1])

    def _newest(self) -> tuple[str | None, list[str]]:
        newest: tuple[int, str | None, list[str]] = (-1, None, [])
        for file in (self.folder / "elastic").glob("*.json"):
            with suppress(OSError, ValueError, KeyError):
                generation = json.loads(file.read_text())["generation"]
                members = [member["name"] for member in generation["members"]]
                newest = max(newest, (generation["number"], generation["host"], members))
        return newest[1:]

    def rows(self) -> list[Row]:
        """Every finished step of every worker."""
        rows = []
        for file in self.folder.glob("steps-*.jsonl"):
            for line in file.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # cut short by a kill
                    rows.append(json.loads(line))
        return rows

    def progress(self) -> tuple[int, int]:
        """(generation, step) of the newest finished step."""
        newest = (-1, 0)
        for file in self.folder.glob("steps-*.jsonl"):
            lines = file.read_bytes()[-800:].splitlines()
            for line in reversed(lines):
                with suppress(ValueError):
                    row = json.loads(line)
                    newest = max(newest, (row["generation"], row["step"]))
                    break
        return newest

    def until(self, done: Callable[[], bool], what: str, limit_s: float) -> float:
        """Wait; the seconds that it took. Raises Stuck with every node's log."""
        start = time.monotonic()
        while not done():
            if time.monotonic() - start > limit_s:
                raise Stuck(f"{what}: not within {limit_s} s\n{self.logs()}")
            time.sleep(0.02)
        return time.monotonic() - start

    def logs(self, last: int = 2500) -> str:
        changes = "\n".join(
            f"{c['generation']} {c['why']} -> {len(c['workers'])} at step {c['step']} from {c['source']}"
            for c in self.changes()[-6:]
        )
        texts = [f"--- journal\n{changes}"]
        for name, process in self.nodes.items():
            text = (self.folder / f"{name}.log").read_bytes()[-last:].decode(errors="replace").strip()
            texts.append(f"--- {name} (code {process.poll()})\n{text}")
        return "\n".join(texts)
