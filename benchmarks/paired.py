"""This checkout beside another, say of the commit before: `python -m benchmarks.paired OTHER [cases]`.

Both run at once, in processes of their own and by their own .venv, and take turns (A B B A …) thing by thing, so that a
machine whose speed drifts drifts for both; reported is the median of the pairs' ratios. This file is what both run, so
it uses only what both have. Models are small, so that what is ours is not lost in what is torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
LIMIT_S = 900
PAIRS = 60
JOBS, KILLS = 5, 6
"""Jobs of each checkout, and kills in each: fewer have said 1.14 of what 30 said to be 1.00."""
Works = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def module(*names: str) -> Any:
    """The first of these that the checkout has: modules move."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def steps(kind: str) -> Works:
    """A step of the base, of SAM and of LPF-SGD on a backend (two ranks)."""
    import elastic_lsopt as lso

    models = module("benchmarks.models")
    size = models.Size(128, 4, 352, 2, 1024, 64, 4)
    base, batch = models.engine(kind, size, lso.Plain()), models.units(size, 1)
    sam = models.beside(base, lso.SAM(rho=0.05))
    lpf_sgd = models.beside(base, lso.LPFSGD(parts=1, gamma=5e-4, alpha=1.0))
    return {
        f"{name}_{kind}": lambda e=engine: e.train_batch(batch)
        for name, engine in (("base", base), ("sam", sam), ("lpf_sgd", lpf_sgd))
    }


def products() -> Works:
    """Ten products with the Hessian, kept and blockwise, and two probes by them (one rank)."""
    import elastic_lsopt as lso

    of = module("benchmarks.curvature.model", "benchmarks.curvature_model")
    shape = of.Shape(64, 2, 2, 32, 4)
    model, batch = of.trained(shape), of.own_batch(shape)
    works: Works = {}
    for mode in ("kept", "blockwise"):
        space, oracle = lso.attach(model, of.LOSS, [batch], products=mode, checked=False)
        v = space.noise(0, 0).vector()
        works[f"ten_products_{mode}"] = lambda o=oracle, v=v: [o.hvp(v) for _ in range(10)]
        works[f"lanczos_{mode}"] = lambda s=space, o=oracle: lso.probes.lanczos(s, o, k=1, tolerance=1e-2)
        works[f"hutchinson_{mode}"] = lambda s=space, o=oracle: lso.probes.hutchinson(s, o, samples=5)
    return works


CASES: dict[str, tuple[Callable[[], Works], int]] = {
    **{f"steps_{kind}": (lambda kind=kind: steps(kind), 2) for kind in ("fsdp2", "zero2", "zero3", "ddp")},
    "products": (products, 1),
}
"""What is timed in this file's own processes, and their number in each checkout."""
MEMBERS = ("fsdp2", "zero2")
"""Backends of jobs with three nodes, whose workers are killed and come back."""


def side_of(turn: int, works: int) -> int:
    """Whose turn it is: two turns for a work, and the order turns round from pair to pair."""
    return (turn % 2) ^ (turn // 2 // works % 2)


def one(case: str, side: int, folder: Path) -> None:
    """A rank of one side: its turns, each when the file `turn` says so."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    works, first = CASES[case][0](), dist.get_rank() == 0
    names, seconds = list(works), module("benchmarks.timing").seconds
    for work in (*works.values(), *works.values()):
        work()
    times: Times = {name: [] for name in names}
    (folder / f"ready{side}").touch()
    for turn in range(2 * PAIRS * len(names)):
        if side_of(turn, len(names)) == side:
            if first:
                wait_for(lambda turn=turn: (folder / "turn").read_text() == str(turn))
            name = names[turn // 2 % len(names)]
            times[name].append(seconds(works[name]))  # begins and ends with a barrier
            if first:
                (folder / "next").write_text(str(turn + 1))
                (folder / "next").replace(folder / "turn")
    if first:
        (folder / f"times{side}.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"the other checkout has not taken its turn within {LIMIT_S} s")
        time.sleep(0.001)


def in_turns(case: str, checkouts: tuple[Path, Path]) -> tuple[Times, Times]:
    """Seconds of each work of a case in both checkouts."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        (Path(folder) / "turn").write_text("")
        sides = []
        for side, checkout in enumerate(checkouts):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CASES[case][1]}"]
            command = [str(checkout / ".venv/bin/python"), *launcher, str(HERE), "--one", case, str(side), folder]
            sides.append(subprocess.Popen(command, cwd=checkout, env=environment(checkout), stdout=sys.stderr))
            running.callback(sides[-1].terminate)
        ready = [Path(folder) / f"ready{side}" for side in (0, 1)]
        wait_for(lambda: all(path.exists() for path in ready) or any(p.poll() for p in sides))
        (Path(folder) / "turn").write_text("0")
        if codes := [p.wait(LIMIT_S) for p in sides if p.wait(LIMIT_S)]:
            raise RuntimeError(f"a checkout's processes ended with {codes}")
        ours, other = (json.loads((Path(folder) / f"times{side}.json").read_text()) for side in (0, 1))
        return ours, other


def members(backend: str, side: int, folder: Path) -> None:
    """From a worker's kill -9 to the next step, and the pause in which it comes back (three nodes of one checkout)."""
    recovery = module("benchmarks.elastic.recovery", "benchmarks.elastic")
    times: Times = {f"kill_{backend}": [], f"join_{backend}": []}
    with recovery.nodes(stock=False, backend=backend, width=recovery.SMALL) as job:
        for _ in range(KILLS):
            moment = time.time()
            times[f"kill_{backend}"].append(recovery.kill_worker(job)[0])
            times[f"join_{backend}"].append(recovery.pause_of_join(job, moment))
            job.whole(recovery.NODES)
    (folder / f"times{side}.json").write_text(json.dumps(times))


def lives(backend: str, checkouts: tuple[Path, Path]) -> tuple[Times, Times]:
    """A job of three nodes fills the machine, so whole jobs take turns."""
    times: tuple[Times, Times] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(JOBS):
            for side in (0, 1)[:: 1 if turn % 2 else -1]:
                checkout = checkouts[side]
                command = [str(checkout / ".venv/bin/python"), str(HERE), "--members", backend, str(side), folder]
                subprocess.run(command, cwd=checkout, env=environment(checkout), timeout=LIMIT_S, check=True)
                for name, found in json.loads((Path(folder) / f"times{side}.json").read_text()).items():
                    times[side].setdefault(name, []).extend(found)
    return times


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def main(other: Path, cases: list[str]) -> None:
    """Print each ratio, and add a line for each case to results/paired.jsonl."""
    from benchmarks.machine import commit, describe

    for case in cases:
        started = {"case": case, "commit": commit(), "other": commit(other)}
        started |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), **describe()}
        backend = case.removeprefix("members_")
        ours, theirs = in_turns(case, (ROOT, other)) if case in CASES else lives(backend, (ROOT, other))
        figures: dict[str, dict[str, float]] = {}
        for name in ours:
            if case in CASES:
                ratios = sorted(a / b for a, b in zip(ours[name], theirs[name], strict=True))
                ratio, (low, _, high) = statistics.median(ratios), statistics.quantiles(ratios, n=4)
            else:  # nothing pairs one kill with another
                ratio = statistics.median(ours[name]) / statistics.median(theirs[name])
                low, high = (statistics.quantiles(ours[name], n=4)[i] / statistics.median(theirs[name]) for i in (0, 2))
            seconds = statistics.median(ours[name])
            figures[name] = {"ratio": ratio, "low": low, "high": high, "seconds": seconds, "pairs": len(ours[name])}
            print(f"{name:24} {ratio:6.3f}  quartiles {low:.3f} … {high:.3f}  {seconds:.4f} s", flush=True)
        with (ROOT / "benchmarks/results/paired.jsonl").open("a") as file:
            file.write(json.dumps(started | {"figures": figures}) + "\n")


def paired_table(file: Path) -> str:
    """The newest run of each case, for the README of the results."""
    if not file.exists():
        return ""
    newest = {row["case"]: row for row in map(json.loads, file.read_text().splitlines())}
    lines = ["## One commit beside another", "", "`python -m benchmarks.paired`: above 1 is slower than before.", ""]
    lines += ["| what | commit | before | ratio | quartiles | pairs |", "|---|---|---|---|---|---|"]
    for row in newest.values():
        for name, f in row["figures"].items():
            spread = f"{f['low']:.2f} to {f['high']:.2f}"
            lines.append(f"| {name} | {row['commit']} | {row['other']} | {f['ratio']:.3f} | {spread} | {f['pairs']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", case, side, folder]:
            # The files beside this one are this checkout's own; those that are measured are on PYTHONPATH.
            sys.path.remove(str(HERE.parent))
            one(case, int(side), Path(folder))
        case ["--members", backend, side, folder]:
            sys.path.remove(str(HERE.parent))
            members(backend, int(side), Path(folder))
        case [other, *cases]:
            known = [*CASES, *(f"members_{backend}" for backend in MEMBERS)]
            if unknown := [case for case in cases if case not in known]:
                sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(known)}.")
            if not (Path(other) / ".venv/bin/python").exists():
                sys.exit(f"{other} has no .venv/bin/python; give another checkout in which `make install` has run.")
            main(Path(other).resolve(), cases or known)
        case _:
            sys.exit("python -m benchmarks.paired OTHER_CHECKOUT [cases]")
