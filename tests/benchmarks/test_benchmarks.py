"""Each benchmark runs at toy size, so that none rots; the table tells a target that is reached from one that is not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import imports, one_process, paired, run
from benchmarks.chaos_table import chaos_table
from benchmarks.curvature import products as curvature
from benchmarks.curvature import spectra as curvature_spectra
from benchmarks.elastic import membership_simulation
from benchmarks.models import TOY
from benchmarks.replicas import simulation
from benchmarks.step.rules import BACKENDS, RULES
from benchmarks.targets import Target, rows
from benchmarks.timing import ratio_of
from tests.processes import warm
from tests.processes.ranks import ROOT, Ranks, rank_environment
from tests.processes.warm import run as run_command

fast = pytest.mark.fast


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=fast), pytest.param("fsdp2", marks=pytest.mark.full), "zero2", "zero3"]
)
def test_steps(ranks: Callable[[int], Ranks], kind: str) -> None:
    figures = ranks(2).run("benchmarks.step.rules:compare", kind=kind, size="toy")[0]
    assert all(figures[f"{rule.name}_{kind}_of_its_passes"] > 0 for rule in RULES if kind in rule.backends)
    if kind in BACKENDS:
        assert figures[f"looksam_{kind}_of_base_step"] > 0 and figures[f"functional_sam_{kind}_of_sam"] > 0


def test_own_steps(ranks: Callable[[int], Ranks]) -> None:
    figures = ranks(1).run("benchmarks.step.updates:own_steps", size="toy")[0]
    assert figures["adamw_own_step_of_torchs_fused"] > 0 and figures["soap_own_step_of_the_authors"] > 0


@pytest.mark.long
@pytest.mark.full
@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "zero2"])
def test_adapters(ranks: Callable[[int], Ranks], kind: str) -> None:
    figures = ranks(2).run("benchmarks.step.adapters:compare", kind=kind, size="toy")[0]
    assert figures[f"flat_lora_{kind}_of_lora_step"] > 0


@pytest.mark.long
def test_sampa_in_halves(ranks: Callable[[int], Ranks]) -> None:
    figures = ranks(2).run("benchmarks.step.sampa_halves:compare", size="toy")[0]
    assert figures["one_microbatch_per_two_ranks_of_serial"] > 0
    assert figures["two_microbatches_per_two_ranks_of_serial"] > 0


def test_one_process() -> None:
    figures = one_process.compare(TOY)
    assert figures["sam_engine_of_pytorch_optimizer"] > 0
    assert figures["sam_landscape_optimizer_of_pytorch_optimizer"] > 0


@pytest.mark.long
@fast
def test_memory_counts_the_weights_copy(ranks: Callable[[int], Ranks]) -> None:
    # On DDP each rank keeps one copy of all weights while perturbed, and nothing of the toy's size hides it.
    figures = ranks(2).run("benchmarks.step.memory:measure", kind="ddp", size="toy", bf16=False)[0]
    assert figures["displaced_ddp_fp32_bytes"] == pytest.approx(figures["ddp_fp32_shard_bytes"], rel=0.01)
    assert figures["sam_ddp_fp32_extra_bytes"] == pytest.approx(figures["ddp_fp32_shard_bytes"], rel=0.05)


def test_products() -> None:
    figures = curvature.compare("toy")
    assert figures["product_auto_chose"] == "kept"
    assert figures["product_hessian_eigenthings_autograd_differs_by"] == pytest.approx(0.0, abs=1e-5)
    assert figures["product_curvlinops_differs_by"] < 0.05  # type: ignore[operator]
    for name in ("kept", "rebuilt", "blockwise", "hessian_eigenthings_differences", "curvlinops"):
        assert figures[f"product_{name}_of_gradient"] > 0  # type: ignore[operator]


@pytest.mark.long
def test_updates_and_an_average(ranks: Callable[[int], Ranks]) -> None:
    figures = ranks(2).run("benchmarks.step.updates:steps", kind="zero2", size="toy")[0]
    assert all(figures[f"{name}_zero2_step_of_adamw"] > 0 for name in ("lars", "lamb", "muon"))
    figures = ranks(2).run("benchmarks.step.updates:averages", kind="zero2", size="toy")[0]
    for name, shards in (("ema", 1), ("swa", 1), ("lawa", 2)):
        assert figures[f"{name}_zero2_bytes_of_fp32_shard"] == pytest.approx(shards, abs=0.01)
    assert ranks(2).run("benchmarks.step.updates:muons_own_step", size="toy")[0]["muon_own_step_of_torch_on_one"] > 0


@pytest.mark.long
@pytest.mark.parametrize("world,place", [(1, "one_process"), pytest.param(2, "ddp", marks=pytest.mark.full)])
def test_trainer_steps(ranks: Callable[[int], Ranks], world: int, place: str) -> None:
    figures = ranks(world).run("tests.cases.trainer_laws:benchmark", size="toy")[0]
    assert figures[f"sam_{place}_of_two_trainer_steps"] > 0 and figures[f"none_{place}_of_trainer_step"] > 0


@pytest.mark.long
def test_on_a_device(ranks: Callable[[int], Ranks]) -> None:
    for part, figure in (
        ("methods", "toy_sam_of_two_base_steps"), ("updates", "toy_muon_step_of_adamw"),
        ("versions", "toy_captured_step_of_step"), ("curvature", "toy_product_of_gradient"),
    ):  # fmt: skip
        assert ranks(1).run(f"benchmarks.device:{part}", size="toy")[0][figure] > 0, part


@pytest.mark.long
@fast
def test_products_under_fsdp2_count_what_they_exchange(ranks: Callable[[int], Ranks]) -> None:
    # Kept: the vector is gathered, the product reduced. Blockwise: weights and vector are gathered more than once.
    figures = ranks(2).run("benchmarks.curvature.products:compare_sharded", size="toy")[0]
    assert figures["product_kept_fsdp2_bytes_of_model"] == pytest.approx(2.0, abs=0.01)  # and a few votes
    assert figures["product_blockwise_fsdp2_bytes_of_model"] > 2
    assert figures["product_kept_fsdp2_of_gradient"] > 0


@pytest.mark.full  # the laws of tests/probes/spectrum run each day
def test_top_eigenvalues_have_the_residuals_that_are_claimed() -> None:
    figures = curvature_spectra.top("toy", most=5)
    assert figures["top5_ours_largest_residual"] <= 1e-3  # type: ignore[operator]
    for peer in ("hessian_eigenthings", "hessian_eigenthings_fewest_steps"):
        assert figures[f"top5_{peer}_largest_residual"] <= 2e-3  # type: ignore[operator]
        assert figures[f"top5_{peer}_largest_difference_from_ours"] <= 2e-3  # type: ignore[operator]
    for peer in ("hessian_eigenthings", "pyhessian"):
        assert figures[f"top5_{peer}_of_ours"] > 0  # type: ignore[operator]


def test_spectral_density_of_both_has_one_trace() -> None:
    figures = curvature_spectra.density("toy", vectors=4, steps=6, turns=2)
    names = [f"spectral_density_{name}_trace" for name in ("ours", "hessian_eigenthings")]
    (ours, theirs), errors = ([figures[f"{n}{end}"] for n in names] for end in ("", "_standard_error"))
    assert abs(ours - theirs) <= 4 * math.hypot(*errors)  # type: ignore[operator, arg-type]
    assert figures["spectral_density_hessian_eigenthings_of_ours"] > 0  # type: ignore[operator]


def test_memory_of_vectors_is_split() -> None:
    """On groups of its own: what other tests have freed in a rank's heap would hide the peak of a toy."""
    measured = []
    for group in (Ranks(1), Ranks(2)):
        measured.append(group.run("benchmarks.curvature.memory:measure", size="toy")[0])
        group.stop()
    one, two = measured
    assert two["vector_tensor_bytes"] / one["vector_tensor_bytes"] == pytest.approx(0.5, abs=0.01)
    assert one["blockwise_peak"] > 0


@fast
def test_a_change_of_members_costs_the_same_at_any_size() -> None:
    figures = membership_simulation.run((20, 40), (1,))
    for change in ("join", "worker_death", "node_silence", "host_death"):
        small, large = (figures[f"{change}_1_an_agent_{n}_messages_per_agent"] for n in (20, 40))
        assert large == pytest.approx(small, rel=0.25)  # type: ignore[arg-type]
        assert figures[f"{change}_1_an_agent_40_rounds"] <= 4  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.full  # the laws of tests/simulation run each day
def test_the_simulation_of_replicas_beside_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = {"TAU": 5, "TIMEOUT_S": 1.0, "AWAY_S": 0.1, "BETWEEN_KILLS_S": 0.8, "Popen": warm.Popen}
    for name, value in toy.items():
        monkeypatch.setattr(simulation, name, value)
    told = simulation.beside(2, seed=1, seconds=3.0, step_s=0.02)
    assert told["kills"] >= 1 and told["steps"] > 10 and told["simulated_seconds_off"] < 0.5, told


@fast
def test_imports() -> None:
    figures = imports.compare("json", ["-c", "import json"], ["-c", "pass"], 2)
    low, high = figures["json_s_spread"]  # type: ignore[misc]
    assert low <= figures["json_s"] <= high


@fast
def test_ratio_is_the_median_of_the_pairs() -> None:
    ratio = ratio_of([2.0, 9.0, 4.0], [1.0, 1.0, 4.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 5.5)


@fast
def test_a_target_is_reached_missed_or_within_the_spread() -> None:
    limit = Target("steps", "x", at_most=1.05)
    assert [limit.reached(v, (v - 0.02, v + 0.02)) for v in (1.05, 1.06, 1.08)] == [
        "yes",
        "within the spread",
        "no",
    ]
    floor = Target("noise", "y", at_least=0.5)
    assert [floor.reached(v, (v - 0.02, v + 0.02)) for v in (0.5, 0.49, 0.4)] == [
        "yes",
        "within the spread",
        "no",
    ]


@fast
def test_the_page_shows_the_newest_run_and_says_what_is_unproved(tmp_path: Path) -> None:
    machine = dict.fromkeys(("python", "torch", "deepspeed", "transformers", "pytorch_optimizer"), "1")
    for day, value in (("2026-01-02", 0.1), ("2026-01-01", 0.7)):
        by = {
            "kind": "cpu",
            "device": "EPYC",
            "cores": 2,
            "load_before": 0.1,
            "time": day,
            "commit": day,
            **machine,
        }
        entry = {"made_by": by, "seconds": 1.0, "figures": {"import_beyond_torch_s": value}}
        (tmp_path / f"{day}.json").write_text(json.dumps({"imports": entry}))
    page = run.page(tmp_path)
    assert "| import_beyond_torch_s | 0.1 | - | ≤ 0.3 | yes |" in page
    assert "0.7" not in page
    assert "## steps on a GPU\n\nUnproved" in page


@fast
def test_the_chaos_table_counts_only_rounds_that_were_checked(tmp_path: Path) -> None:
    head = {"backend": "fsdp2", "seed": 1}
    lines = [
        {**head, "event": "kill", "seconds": 1.0},
        {**head, "event": "stop", "seconds": 5.0},
        {**head, "round": "passed", "events": 2, "commit": "abc"},
        {**head, "seed": 2, "event": "kill", "seconds": 2.0},
        {**head, "seed": 2, "failure": "stuck", "why": "", "commit": "def"},
        {**head, "seed": 3, "event": "kill", "seconds": 99.0},  # its round was interrupted
    ]
    results = tmp_path / "chaos.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| fsdp2 | 3 | 200 | 1 | stuck (2) | 2.0, 5.0 | abc, def |" in chaos_table(results)
    assert "Unproved" in chaos_table(tmp_path / "none")


@fast
def test_rows_put_figures_with_a_target_first() -> None:
    figures = {
        "import_torch_s": 1.0,
        "import_beyond_torch_s": 0.4,
        "import_beyond_torch_s_spread": [0.35, 0.5],
    }
    order = [(r[0], r[4]) for r in rows("imports", figures)]
    assert order == [
        ("import_beyond_torch_s", "no"),
        ("import_torch_s", "-"),
    ]


@fast
def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["stpes"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@fast
def test_two_checkouts_take_turns_thing_by_thing() -> None:
    """Both sides of a pair follow each other, and who is first turns round from one pair of a work to its next."""
    works = 3
    turns = [(turn // 2 % works, paired.side_of(turn, works)) for turn in range(4 * works)]
    assert [work for work, _ in turns] == [0, 0, 1, 1, 2, 2] * 2
    first, second = turns[: 2 * works], turns[2 * works :]
    assert [side for _, side in first] == [0, 1] * works and [side for _, side in second] == [1, 0] * works


@fast
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([".", "stepz"], "no case stepz; there are steps_"),
        (["/no/such"], "/no/such has no .venv/bin"),
    ],
)
def test_a_wrong_pairing_is_one_line(arguments: list[str], says: str) -> None:
    done = run_command(
        [sys.executable, "-m", "benchmarks.paired", *arguments], cwd=ROOT, env=rank_environment(), timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
