"""State that survives a change of members: groups torn down and formed again, and every number where it belongs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.elastic.memory.reshard import choose, messages, transfers
from elastic_lsopt.elastic.memory.versions import Chunk

CASES = "tests.cases.elastic.elastic_state:"
KINDS = ("ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")


def law_5(ranks: Any, kind: str, before: int, after: int, dead: list[int], *, base: str) -> None:
    """Ranks die, others come, and what the living hold is the new layout's, bit for bit; training goes on from it."""
    out = ranks(4).run(CASES + "survive", kind=kind, base=base, before=before, after=after, dead=dead)
    went_on = [r for r in out if "equal" in r]
    assert len(went_on) == after
    undisturbed = next(r["continued"] for r in out if "continued" in r)
    for r in went_on:
        assert all(r["equal"].values()), r
        assert r["step"] == 4 and r["extra"] == {"cursor": [4, "a"]}
        # muon rounds to bf16, where another order of a sum may show
        assert r["went_on"] == pytest.approx(undisturbed, rel=1e-3 if base == "muon" else 1e-6)


@pytest.mark.parametrize(
    ("kind", "worlds", "sever"),
    [
        # Each kind is torn down whole; after a cut, one kind a framework here and the others in the full product.
        *((kind, (1, 3, 2), False) for kind in KINDS),
        *((kind, (1, 3, 2), True) for kind in ("fsdp2", "zero3")),
        *(pytest.param(k, (1, 3, 2), True, marks=pytest.mark.full) for k in KINDS if k not in ("fsdp2", "zero3")),
        *(pytest.param(k, (1, 2, 3, 2, 1), False, marks=pytest.mark.full) for k in KINDS),
    ],
)
def test_an_engine_is_rebuilt_at_another_world_size_in_the_same_processes(
    ranks: Any, kind: str, worlds: tuple[int, ...], sever: bool
) -> None:
    out = ranks(3).run(CASES + "rebuild", kind=kind, worlds=worlds, sever=sever)
    alone = out[0]["losses"][0]
    for rank, r in enumerate(out):
        assert len(r["losses"]) == sum(world > rank for world in worlds)
        for losses in r["losses"]:
            assert losses == pytest.approx(alone, rel=1e-6), f"rank {rank}"
        assert r["left"] == 0, f"rank {rank}: {r['left']} bytes were not freed"


@pytest.mark.parametrize("kind", ["zero2", "fsdp2"])
def test_a_process_that_has_had_zero3_and_a_new_one_train_together(ranks: Any, kind: str) -> None:
    """ZeRO-3 puts a linear of its own in the place of torch's. Where only some ranks have it, gradients are ready in
    another order there, and DeepSpeed adds up in the order in which they are."""
    out = ranks(2).run(CASES + "another_past", before="zero3", kind=kind)
    [alone, *_] = out[0]["losses"]
    for rank, r in enumerate(out):
        assert all(r["own"]), f"rank {rank}"
        assert r["losses"][-1] == pytest.approx(alone, rel=1e-6), f"rank {rank}"


# -- every number arrives, with real ranks ---------------------------------------------------------------------------

DEATHS = [
    ("ddp", "adamw", 2, 3, [0]), ("fsdp2", "adamw", 3, 2, [1]), ("fsdp2", "momentum", 2, 4, []),
    ("hsdp", "momentum", 4, 3, [1]), ("zero0", "adamw", 2, 3, [0]), ("zero1", "adamw", 2, 4, []),
    ("zero2", "momentum", 3, 2, [0]), ("zero3", "momentum", 3, 2, [1]), ("zero3", "adamw", 2, 3, [1]),
    # an update of ours, and an average beside it
    ("ddp", "muon", 2, 3, [0]), ("fsdp2", "lamb", 3, 2, [1]), ("fsdp2", "muon", 2, 3, [1]),
    ("zero2", "lars", 3, 2, [0]), ("zero2", "muon", 2, 3, [0]), ("zero3", "lamb", 2, 3, []),
    ("zero3", "muon", 3, 2, [1]), ("ddp", "soap", 2, 3, [0]),
    pytest.param("zero2", "soap", 3, 2, [0], marks=pytest.mark.full),
    pytest.param("fsdp2", "schedule_free_adamw", 2, 3, [1], marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "base", "before", "after", "dead"), DEATHS)
def test_what_the_living_hold_becomes_the_new_layout_bit_by_bit(
    ranks: Any, kind: str, base: str, before: int, after: int, dead: list[int]
) -> None:
    law_5(ranks, kind, before, after, dead, base=base)


def test_training_goes_on_as_if_nothing_had_happened_in_fp64(ranks: Any) -> None:
    out = ranks(4).run(CASES + "survive", kind="fsdp2", base="adamw", before=3, after=2, dead=[0], fp64=True)
    for r in out:
        if "went_on" in r:
            assert r["went_on"] == pytest.approx(out[0]["continued"], rel=1e-12)


def test_a_planned_departure_of_a_rank_and_its_mirror_loses_nothing_and_a_death_of_both_does(ranks: Any) -> None:
    both: dict[str, Any] = {"kind": "fsdp2", "base": "adamw", "before": 4, "after": 2, "dead": [1, 2]}
    out = ranks(4).run(CASES + "survive", planned=True, **both)
    assert all(all(out[r]["equal"].values()) for r in (0, 3))
    out = ranks(4).run(CASES + "survive", **both)
    assert out[0] == out[3] == {"lost": True}


# -- the plan as a pure function -------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[Chunk]], list[list[Chunk]]]:
    """What 1 to 5 ranks hold of two keys, pieces of which several may hold, and what each of them wants."""
    world = draw(st.integers(1, 5))
    held: list[list[Chunk]] = [[] for _ in range(world)]
    wanted: list[list[Chunk]] = [[] for _ in range(world)]
    for key in ("a", "b"):
        numel = draw(st.integers(1, 30))
        for out, everyone in ((held, True), (wanted, False)):
            cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))})
            for low, high in pairwise(cuts):
                for rank in draw(st.sets(st.integers(0, world - 1), min_size=int(everyone))):
                    out[rank].append((key, low, high - low))
    return held, wanted


def elements(chunks: list[Chunk]) -> set[tuple[str, int]]:
    return {(key, i) for key, offset, length in chunks for i in range(offset, offset + length)}


@settings(max_examples=300)
@given(layouts())
def test_each_missing_element_comes_once_from_a_holder_and_nothing_else_moves(case: Any) -> None:
    held, wanted = case
    moves = transfers(held, wanted)
    for rank, runs in enumerate(wanted):
        coming = [(m.chunk[0], i) for m in moves if m.target == rank for _, i in sorted(elements([m.chunk]))]
        assert sorted(coming) == sorted(elements(runs) - elements(held[rank]))  # once, and no more than is missing
    assert all(elements([m.chunk]) <= elements(held[m.source]) and m.source != m.target for m in moves)


@settings(max_examples=200)
@given(layouts(), st.integers(1, 9))
def test_messages_are_bounded_and_carry_the_same_elements(case: Any, limit: int) -> None:
    moves = transfers(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastic_lsopt.elastic.memory.reshard.MESSAGE_BYTES", 4 * limit)
        packed = messages(moves, {"a": 4, "b": 2})
    assert all(sum(m.chunk[2] * {"a": 4, "b": 2}[m.chunk[0]] for m in message) <= 4 * limit for message in packed)
    assert all(len({(m.source, m.target) for m in message}) == 1 for message in packed)

    def carried(all_moves: Any) -> list[Any]:
        return sorted((m.source, m.target, e) for m in all_moves for e in elements([m.chunk]))

    assert carried(m for message in packed for m in message) == carried(moves)


def held(stamp: tuple[int, int], rank: int, chunks: list[Chunk], checksum: int = 0) -> tuple[Any, Any]:
    """A version of an inventory: key "w" has 10 elements in all."""
    index = {"w": ["F32", 10, [[at, n, 0] for _, at, n in chunks]]}
    entry = {
        "generation": stamp[0], "step": stamp[1], "rank": rank, "world": 2, "node": "", "bytes": 0,
        "checksum": checksum, "clock": {"samples": stamp[1] * 8, "steps": stamp[1]}, "extra": {"cursor": stamp[1]},
    }  # fmt: skip
    return entry, {"index": index, "whole": {"w": 10, "rng/0/cpu": 5056, "metadata/1": 4096}}


def rank_with(*versions: tuple[Any, Any]) -> Any:
    return {
        "indexes": [index for _, index in versions],
        "versions": [{**entry, "index": i} for i, (entry, _) in enumerate(versions)],
    }


LEFT, RIGHT = [("w", 0, 6)], [("w", 6, 4)]


def test_the_newest_moment_of_which_nothing_is_lost_is_chosen() -> None:
    a = rank_with(held((1, 4), 0, LEFT), held((1, 5), 0, LEFT), held((1, 4), 1, RIGHT))
    assert choose([a, rank_with()]).step == 4  # type: ignore[union-attr]
    b = rank_with(held((1, 5), 1, RIGHT))
    chosen = choose([a, b])
    assert chosen is not None and (chosen.generation, chosen.step, chosen.extra) == (1, 5, {"cursor": 5})
    assert (chosen.clock.samples, chosen.clock.steps) == (40, 5)


def test_two_generations_are_never_mixed_and_a_loss_is_said() -> None:
    assert choose([rank_with(held((1, 5), 0, LEFT)), rank_with(held((2, 5), 1, RIGHT))]) is None
    assert choose([rank_with(), rank_with()]) is None
    complete = [held((1, 9), 0, LEFT), held((1, 9), 1, RIGHT), held((2, 5), 0, LEFT), held((2, 5), 1, RIGHT)]
    assert choose([rank_with(*complete)]).generation == 2  # type: ignore[union-attr]


def test_copies_that_differ_do_not_count() -> None:
    good, bad = held((1, 5), 1, RIGHT, 7), held((1, 5), 1, RIGHT, 8)
    left = rank_with(held((1, 5), 0, LEFT))
    assert choose([left, rank_with(good), rank_with(good)]) is not None
    assert choose([left, rank_with(good), rank_with(bad)]) is None
