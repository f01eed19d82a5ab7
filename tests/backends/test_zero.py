"""DeepSpeed's stages under the laws of the design, on real engines in real processes."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.laws.cover import daily, joined
from tests.processes.ranks import Ranks

STAGES = (0, 1, 2, 3)
METHODS = ("none", "sam", "asam", "lpf_sgd")
SMALL = {1: {"reduce_bucket_size": 60}, 2: {"reduce_bucket_size": 60, "overlap_comm": True}}
"""Buckets smaller than a parameter; the first moves of `overlap_comm`."""
PIECEMEAL = [
    {"stage3_param_persistence_threshold": t, "sub_group_size": g} for t, g in ((0, 50), (12, 10**9), (10**6, 1))
]
"""ZeRO-3 with nothing, some and everything kept gathered, and small sub-groups."""
LAYOUTS = [PIECEMEAL[0], *(pytest.param(zero, marks=pytest.mark.full) for zero in PIECEMEAL[1:])]


def law_1(out: list[dict[str, float]], method: str) -> None:
    for rank, r in enumerate(out):
        assert r["dw"] <= 1e-6, f"rank {rank}: {r}"
        assert r["dloss"] <= 1e-6, f"rank {rank}: {r}"
        assert r["passes"] == (2 if "sam" in method else 1), f"rank {rank}: {r}"


# -- law 1: the paper's loop -----------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("method", ["sam", "lpf_sgd"])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_papers_loop_on_two_ranks(ranks: Any, stage: int, method: str) -> None:
    law_1(ranks(2).run("tests.cases.laws:reference", kind=f"zero{stage}", method=method, clip=0.5, last=2), method)


@pytest.mark.parametrize("stage,world,method", daily(STAGES, (1, 2, 3), METHODS))
def test_the_papers_loops(ranks: Any, stage: int, world: int, method: str) -> None:
    """In turns with few units and with uneven counts of them on the ranks, clipping off and on; the pairs of method,
    stage and world are in tests/laws/test_cover.py."""
    k = METHODS.index(method)
    units = 3 if (k + stage + world) % 2 else 3 * world + 1
    law_1(
        ranks(world).run(
            "tests.cases.laws:reference", kind=f"zero{stage}", method=method, units=units, last=2,
            clip=0.5 * ((k // 2 + stage) % 2),
        ),
        method,
    )  # fmt: skip


@pytest.mark.parametrize(
    "stage,extra",
    [
        *((stage, ["tied", "frozen", "unused"]) for stage in STAGES),
        *daily(STAGES, [["tied"], ["frozen"], ["unused"]], seed=1),
    ],
    ids=joined,
)
def test_unusual_parameters(ranks: Any, stage: int, extra: list[str]) -> None:
    """The base decays no weights: DeepSpeed decays an unused parameter too, where torch leaves it alone."""
    law_1(
        ranks(2).run(
            "tests.cases.laws:reference", kind=f"zero{stage}", method="sam", extra=extra, base="sgd", units=5, clip=0.5
        ),
        "sam",
    )


@pytest.mark.parametrize("stage,zero", [*SMALL.items(), *((3, z) for z in PIECEMEAL)], ids=str)
def test_buckets_sub_groups_and_persistence(ranks: Any, stage: int, zero: dict[str, Any]) -> None:
    law_1(
        ranks(3).run("tests.cases.laws:reference", kind=f"zero{stage}", method="sam", zero=zero, units=5, clip=0.5),
        "sam",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_param_groups_and_their_learning_rates(ranks: Any, stage: int) -> None:
    for dw in ranks(2).run(
        "tests.cases.zero.steps:groups", stage=stage, zero={"sub_group_size": 50} if stage == 3 else {}
    ):
        assert dw <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_unused_in_a_step_stays_where_it_is(ranks: Any, stage: int) -> None:
    for dw in ranks(2).run("tests.cases.zero.steps:stale_gradient", stage=stage):
        assert dw <= 1e-6


@pytest.mark.parametrize(
    "stage,bf16,sums", [*((s, False, None) for s in STAGES), *((s, True, "fp32") for s in (1, 2, 3))]
)
def test_an_installed_vector_is_clipped_and_stepped_with(ranks: Any, stage: int, bf16: bool, sums: str | None) -> None:
    for error in ranks(3).run("tests.cases.zero.steps:installed", stage=stage, bf16=bf16, sums=sums):
        assert error <= 1e-4


@pytest.mark.parametrize(
    "stage,sums",
    [
        (1, "fp32"),
        (2, None),
        (3, None),
        *(pytest.param(*row, marks=pytest.mark.full) for row in ((0, None), (1, None), (2, "fp32"), (3, "fp32"))),
    ],
)
def test_bf16_is_as_near_as_the_base(ranks: Any, stage: int, sums: str | None) -> None:
    base, sam = (
        ranks(2).run("tests.cases.zero.steps:bf16_distance", stage=stage, method=m, sums=sums)[0]
        for m in ("none", "sam")
    )
    assert 0 < base < 3e-4
    assert sam <= 2 * base


@pytest.mark.full
@pytest.mark.parametrize(
    "stage,world,method,units,clip", list(itertools.product(STAGES, [1, 2, 3, 4], METHODS, [3, 9], [0.0, 0.5]))
)
def test_full_product(ranks: Any, stage: int, world: int, method: str, units: int, clip: float) -> None:
    law_1(
        ranks(world).run(
            "tests.cases.laws:reference", kind=f"zero{stage}", method=method, units=max(units, world), clip=clip
        ),
        method,
    )


# -- law 2: the rest point -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_at_rest_it_is_the_base(ranks: Any, stage: int) -> None:
    for method, point, passes in (("sam", {"rho": 0.0}, 2), ("lpf_sgd", {"gamma": 0.0, "parts": 3}, 1)):
        for r in ranks(2).run("tests.cases.laws:rest", kind=f"zero{stage}", method=method, rest_point=point):
            assert r["dw"] <= 1e-6
            assert r["passes"] == passes


# -- law 3: return ---------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_displacements_return_bit_for_bit(ranks: Any, stage: int, bf16: bool) -> None:
    for r in ranks(2).run("tests.cases.laws:returned", kind=f"zero{stage}", bf16=bf16):
        assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.parametrize("zero", LAYOUTS, ids=str)
def test_displacements_return_on_any_layout_of_stage_3(ranks: Any, zero: dict[str, Any]) -> None:
    for bf16 in (False, True):
        for r in ranks(3).run("tests.cases.laws:returned", kind="zero3", zero=zero, bf16=bf16):
            assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.parametrize(
    "stage,zero",
    [
        *((stage, {}) for stage in (0, 1, 2)), (3, PIECEMEAL[0]),
        *(pytest.param(3, zero, marks=pytest.mark.full) for zero in PIECEMEAL[1:]),
    ],
    ids=str,
)  # fmt: skip
def test_the_forward_follows_the_weights(ranks: Any, stage: int, zero: dict[str, Any]) -> None:
    for apart in ranks(2).run("tests.cases.zero.steps:forward_follows", stage=stage, zero=zero):
        assert max(apart) <= 1e-6
    for apart in ranks(2).run("tests.cases.zero.steps:forward_follows", stage=stage, zero=zero, bf16=True):
        assert max(apart) == 0


BACK = {"local": True, "refused": True, "settled": True}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_raise_in_the_displaced_pass_and_training_goes_on(ranks: Any, stage: int, where: str) -> None:
    small = {"reduce_bucket_size": 20}  # so that some gradients are reduced already
    first, second = ranks(2).run("tests.cases.zero.failures:raised", stage=stage, where=where, ranks=None, zero=small)
    assert first == second
    assert first == {"error": "ValueError: on purpose", "goes_on": "0.8100", **BACK}


@pytest.mark.parametrize(
    "stage,where,bf16",
    [
        (0, "forward", False),
        (2, "backward", True),
        (3, "backward", True),
        pytest.param(3, "forward", False, marks=pytest.mark.full),
    ],
)
def test_one_rank_raises_in_the_displaced_pass(stage: int, where: str, bf16: bool) -> None:
    """Its peer learns of it inside a collective; both have their weights, and all copies after `resync`."""
    group = Ranks(2)  # of its own: the case cuts the connections
    zero = {"stage3_param_persistence_threshold": 12} if stage == 3 else {}
    try:
        first, second = group.run(
            "tests.cases.zero.failures:raised", stage=stage, where=where, ranks=[0], bf16=bf16, zero=zero
        )
    finally:
        group.stop()
    assert first == {"error": "ValueError: on purpose", "goes_on": "PeerFailed", **BACK}
    assert second.pop("error").startswith("PeerFailed: rank 0 raised ValueError: on purpose")
    assert second == {"goes_on": "PeerFailed", **BACK}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_by_all(ranks: Any, stage: int) -> None:
    assert ranks(2).run("tests.cases.zero.failures:non_finite", stage=stage) == [{"skipped": 1, "same": True}] * 2


# -- the contract of the space ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_lengths_and_angles(ranks: Any, stage: int, world: int) -> None:
    """With NaN in the padding of weights and gradients; three ranks share a parameter of one element."""
    for bf16 in (False, True):
        ranks(world).run("tests.cases.zero.steps:geometry", stage=stage, bf16=bf16)
    if stage == 3:
        for zero in PIECEMEAL:
            ranks(world).run("tests.cases.zero.steps:geometry", stage=stage, zero=zero)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_noise_is_the_parameters(ranks: Any, stage: int, world: int) -> None:
    ranks(world).run("tests.cases.zero.steps:noise", stage=stage, zero={"sub_group_size": 50} if stage == 3 else {})


# -- law 7: memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage,bf16,sums,masters",
    [
        (0, False, None, 1),
        (2, False, None, 0),
        (1, True, "fp32", 0),
        (3, True, None, 0),
        *(pytest.param(*row, marks=pytest.mark.full) for row in ((1, False, None, 0), (2, True, "fp32", 0))),
    ],
)
def test_what_sam_holds_beyond_the_base(ranks: Any, stage: int, bf16: bool, sums: str | None, masters: int) -> None:
    for r in ranks(2).run("tests.cases.zero.steps:memory", stage=stage, bf16=bf16, sums=sums):
        assert r["masters"] == masters


@pytest.mark.parametrize(
    "stage,bf16,sums", [(1, False, None), (1, True, "fp32"), (2, False, None), (2, True, "fp32"), (3, False, None)]
)
def test_the_gradient_is_lent_from_deepspeeds_buffer(ranks: Any, stage: int, bf16: bool, sums: str | None) -> None:
    assert ranks(2).run("tests.cases.zero.steps:lease_is_deepspeeds", stage=stage, bf16=bf16, sums=sums) == [True, True]


@pytest.mark.parametrize("bf16", [False, True])
def test_stage_3_never_has_the_whole_model_on_a_device(ranks: Any, bf16: bool) -> None:
    wanted = {"whole": 0, "buffer": "torch.float32"}
    assert ranks(2).run("tests.cases.zero.shards:moved_whole", bf16=bf16) == [wanted] * 2


def test_a_model_on_the_meta_device_is_refused_before_it_is_cut(ranks: Any) -> None:
    [said] = ranks(1).run("tests.cases.zero.shards:refused_on_meta")
    assert said.startswith("parameter first.weight is on the meta device"), said


# -- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_counters_learning_rate_and_evaluation(ranks: Any, stage: int) -> None:
    for r in ranks(2).run("tests.cases.zero.steps:bookkeeping", stage=stage):
        assert r == {"evaluated": True, "still": 0.0, "counts": [3, 3, 0], "boundary": None, "momentum": True}
    assert ranks(2).run("tests.cases.zero.steps:same_with_evaluation", stage=stage) == [True, True]


# -- refusals --------------------------------------------------------------------------------------------------------

ZERO_OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (3, {"zero_hpz_partition_size": 2}),
    (3, {"zero_quantized_weights": True}),
    (3, {"zero_quantized_gradients": True}),
    (3, {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}),
    (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}),
    (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
    (3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}),
    (2, {"offload_optimizer": {"device": "cpu", "pipeline_read": True}}),
    (2, {"offload_param": {"device": "cpu"}}),
    (0, {"offload_optimizer": {"device": "cpu"}}),
    (2, {"zenflow": {"topk_ratio": 0.1}}),
    (2, {"reduce_scatter": False}),
    (2, {"contiguous_gradients": False}),
    (1, {"round_robin_gradients": True}),
    (1, {"no_such_option": 1}),
]
OTHER_OPTIONS: list[dict[str, Any]] = [
    {"fp16": {"enabled": True}},
    {"elasticity": {"enabled": True}},
    {"compile": {"deepcompile": True}},
    {"tensor_parallel": {"autotp_size": 2}},
    {"sequence_parallel_size": 2},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"prescale_gradients": True},
    {"communication_data_type": "fp16"},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    {"data_efficiency": {"enabled": True}},
]


@pytest.mark.parametrize(
    "config", [*({"zero_optimization": {"stage": s, **o}} for s, o in ZERO_OPTIONS), *OTHER_OPTIONS], ids=str
)
def test_what_is_not_tested_is_refused(ranks: Any, config: dict[str, Any]) -> None:
    [said] = ranks(1).run("tests.cases.zero.refusals:refused", config=config)
    blocks = [config, *(b for b in config.values() if isinstance(b, dict))]
    assert said.split(":")[0] in ("Unsupported", "SettingError"), said
    assert any(str(key) in said for block in blocks for key in block), said
    assert "\n" not in said


def test_a_parameter_without_dimensions_is_refused(ranks: Any) -> None:
    """DeepSpeed 0.19.8 fails on it somewhere in its first broadcast."""
    [said] = ranks(1).run("tests.cases.zero.refusals:refused_scalar")
    assert said.startswith("UserError: parameter temperature has no dimensions, which DeepSpeed does not take"), said


def test_an_engine_of_the_users_own(ranks: Any) -> None:
    """Attached as it is where it is tested, else refused; its accumulation must be 1."""
    untested = {"zero_allow_untested_optimizer": True}
    for config, wanted in (
        ({"zero_optimization": {"stage": 2}, **untested}, "accepted"),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, **untested}, "accepted"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}, **untested}, "round_robin_gradients"),
    ):
        for said in ranks(2).run("tests.cases.zero.refusals:refused_engine", config=config):
            assert wanted in said


def test_another_deepspeed_is_refused(ranks: Any) -> None:
    [said] = ranks(1).run("tests.cases.zero.refusals:refused_version", version="0.18.2")
    assert said.startswith("Unsupported: DeepSpeed 0.18.2 was found") and "0.19.8" in said
    [said] = ranks(1).run("tests.cases.zero.refusals:refused_insides", name="an_attribute")
    assert said.startswith("Unsupported: DeepSpeed 0.19.8: DeepSpeedZeroOptimizer has no an_attribute")


def test_all_private_names_stand_in_one_table() -> None:
    """What the adapters read of DeepSpeed's objects is in the table that is checked at start-up."""
    folder = Path(__file__).parents[2] / "elastic_lsopt" / "backends" / "zero"
    tree = ast.parse((folder / "zero_backend.py").read_text())
    [table] = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PRIVATE"]
    known = {name for names in ast.literal_eval(table).values() for name in names}
    public = {"zero_grad", "set_gradient_accumulation_boundary", "backward", "step", "was_step_applied"}
    seen = set()
    for path in folder.glob("zero[0-9_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("z", "self._wrapper"):
                seen.add(node.attr)
    assert len(seen) > 15
    assert seen <= known | public
