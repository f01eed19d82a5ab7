"""`elastic-lsopt plan --simulate` as a user meets it: what it prints, draws, reads of a file, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from elastic_lsopt.consensus import registry
from tests.docs.blocks import blocks, commands

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
SHORT = ("--replicas", "8,100", "--days", "2")


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(capsys, *arguments: str) -> dict[str, Any]:
    overrides = [a for a in arguments if "=" in a]
    options = [a for a in arguments if "=" not in a]
    assert main(["plan", QUICKSTART, *overrides, "--simulate", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_tables_the_bars_and_the_picture(capsys):
    assert main(["plan", QUICKSTART, "--simulate", *SHORT, "--plot", "goodput.png"]) == 0
    out = capsys.readouterr().out
    for said in (
        "replicas of 2 GPUs, 2 days simulated, a failure per GPU in 8,766 h", "Goodput, %", "synchronous", "elastic",
        "consensus", "a loss is known at the deadline only", "What the rest went to", "drawn in goodput.png",
    ):  # fmt: skip
        assert said in out
    assert Path("goodput.png").read_bytes().startswith(b"\x89PNG")
    [bar] = [line for line in out.splitlines() if line.startswith("      100 synchronous")]
    share = float(bar.split()[-1])
    assert bar.count("█") == int(40 * share / 100)


def test_json_has_each_mode_of_each_number_and_the_settings(capsys):
    found = told(capsys, *SHORT, "--tau", "10", "--mtbf-h", "inf", "--spread", "0", "--exchange-s", "0.5")
    assert [(o["replicas"], o["mode"]) for o in found["outcomes"]] == [
        (n, mode) for n in (8, 100) for mode in ("synchronous", "elastic", "consensus")
    ]
    assert [o["goodput"] for o in found["outcomes"]] == pytest.approx([1 / 1.5, 1 / 1.5, 10 / 10.5] * 2)
    assert found["settings"]["tau"] == 10 and found["settings"]["mtbf_h"] is None


def test_the_files_workers_and_lease_stand_where_no_option_does(capsys):
    assert told(capsys, *SHORT)["settings"]["gpus"] == 2
    found = told(capsys, *SHORT, "elastic={max_nodes: 4, lease_s: 1.5}", "workers=4", "--gpus", "3")
    assert (found["settings"]["gpus"], found["settings"]["notice_s"]) == (3, 3.0)
    assert told(capsys, *SHORT, "elastic={max_nodes: 4}", "--notice-s", "inf")["settings"]["notice_s"] is None


def test_a_consensus_block(capsys):
    block = "consensus={rule: %s, replicas: 4, exchange_timeout_s: 5%s}"
    found = told(capsys, "workers=8", block % ("local_sgd", ", tau: 16, steps: by_speed"), "--days", "0.1")
    settings = {name: found["settings"][name] for name in ("gpus", "tau", "timeout_s", "steps")}
    assert settings == {"gpus": 2, "tau": 16, "timeout_s": 5.0, "steps": "by_speed"}
    assert [o["replicas"] for o in found["outcomes"][::3]] == [4, 100, 1000, 10_000, 100_000]
    found = told(capsys, "workers=4", block % ("diloco", ""), *SHORT)
    assert found["settings"]["tau"] == registry.build("diloco").tau and found["settings"]["steps"] == "by_size"


def test_a_trace_is_watched_to_its_end(capsys):
    Path("trace.csv").write_text("replica,down_s,up_s\n1,100,700\n0,5000,5600\n")
    given = ("--gpus", "1", "--trace", "trace.csv", "--restart-s", "400", "--spread", "0")
    found = told(capsys, "--replicas", "4", *given)
    assert found["settings"]["days"] * 86_400 == pytest.approx(6000)
    elastic = found["outcomes"][1]
    assert elastic["failures"] == 2 and elastic["losses"]["away"] == pytest.approx(2 * 1000 / (4 * 6000))
    assert main(["plan", QUICKSTART, "--simulate", "--replicas", "4", *given]) == 0
    assert "failures of a trace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--replicas", "8,x"], "--replicas 8,x must be numbers of replicas from 1 to 1,000,000, such as 8,100,1000."),
        (["--replicas", "0"], "--replicas 0 must be numbers"),
        (["--replicas", "10000000"], "--replicas 10000000 must be numbers"),
        (["--tau", "0"], "--tau 0 must be a whole number >= 1 and <= 10,000."),
        (["--tau", "2.5"], "--tau 2.5 must be a whole number"),
        (["--step-s", "0"], "--step-s 0 must be a number > 0."),
        (["--step-s", "nan"], "--step-s nan must be a number > 0."),
        (["--step-s", "inf"], "--step-s inf must be a number > 0."),
        (["--mtbf-h", "-1"], "--mtbf-h -1 must be a number > 0."),
        (["--exchange-s", "fast"], "--exchange-s fast must be a number >= 0."),
        (["--spread", "0.5"], "--spread 0.5 must be a number >= 0 and <= 0.25."),
        (["--step-times", "uniform"], "--step-times uniform must be normal or exponential."),
        (
            ["--step-times", "exponential", "--spread", "0.1"],
            "--spread 0.1 stands beside --step-times exponential, which has its own",
        ),
        (["--heals", "--gpus", "1"], "--heals needs --gpus >= 2"),
        (["--replicas", "1000000", "--gpus", "64"], "--replicas 1000000 times --gpus 64 must be at most 20,000,000"),
        (["--worlds", "8"], "--worlds is of the plan: leave it out with --simulate."),
        (["--price-per-hour", "2"], "--price-per-hour is of the plan"),
        (["--plot", "goodput.txt"], "--plot goodput.txt must end in .png, .svg or .pdf."),
        (["--plot", "nowhere/goodput.png"], "there is no folder nowhere; make it first."),
        (["--trace", "nowhere.csv"], "--trace nowhere.csv cannot be read: No such file or directory."),
        (["--trace", "t.csv", "--mtbf-h", "5"], "--trace tells the failures: leave --mtbf-h out."),
        (["--trace", "t.csv", "--replicas", "4,9"], "t.csv:2: replica=7 must be below --replicas 4"),
        (["max_steps=-1"], "max_steps"),
    ],
)
def test_a_mistake_is_one_line(capsys, given, says):
    Path("t.csv").write_text("replica,down_s,up_s\n7,1,2\n")
    overrides = [g for g in given if "=" in g]
    assert main(["plan", QUICKSTART, *overrides, "--simulate", *(g for g in given if g not in overrides)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("elastic-lsopt: ") and printed.err.count("\n") == 1
    assert says in printed.err


@pytest.mark.parametrize("given", [["--tau", "8"], ["--heals"], ["--trace", "x.csv"], ["--plot", "x.png"]])
def test_its_options_need_it(capsys, given):
    assert main(["plan", QUICKSTART, *given]) == 2
    assert capsys.readouterr().err == f"elastic-lsopt: {given[0]} needs --simulate.\n"


def test_the_commands_and_the_trace_of_the_documentation(capsys, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs/pictures").mkdir(parents=True)
    [trace] = blocks("docs/simulation.md", "text")
    (tmp_path / "outages.csv").write_text(trace.text)
    simulated = commands("docs/simulation.md")
    assert len(simulated) == 5
    for command in simulated:
        assert main([*command[1:], *([] if "--trace" in command else ["--days", "0.2"])]) == 0, command
    assert (tmp_path / "docs/pictures/simulated-goodput.png").exists()
