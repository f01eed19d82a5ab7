"""Law 4: saved, loaded, continued equals never stopped; bit-exact on the same layout, 1e-6 on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CASES = "tests.cases.checkpoints.round_trip:"


def furthest(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name], strict=True))


def law_4(ranks: Any, tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int], **more: Any) -> float:
    """max |dw| at step 6 between never stopped on `saved` and continued from step 3 on `loaded`."""
    (kind, world), (other, other_world) = saved, loaded
    never_stopped = ranks(world).run(CASES + "save_midway", path=str(tmp_path), kind=kind, **more)[0]
    continued = ranks(other_world).run(CASES + "resume_and_finish", path=str(tmp_path), kind=other, **more)
    return max(furthest(never_stopped, mine) for mine in continued)


SAME = [
    ("plain", 1, "adamw"), ("ddp", 2, "drifting"), ("fsdp2", 2, "adamw"), ("fsdp2", 3, "momentum"),
    ("hsdp", 2, "drifting"), ("zero1", 2, "drifting"), ("zero2", 2, "momentum"),
    ("zero3+small", 3, "adamw"), ("zero3", 2, "adamw"),
    ("plain", 1, "lars"), ("ddp", 2, "lamb"), ("fsdp2", 3, "muon"), ("zero2", 2, "lars"), ("zero2", 3, "muon"),
    ("zero3", 2, "lamb"), ("zero3+small", 2, "muon"), ("hsdp", 4, "soap"),
    pytest.param("zero2", 3, "adaptive_memory_adamw", marks=pytest.mark.full),
    pytest.param("fsdp2", 2, "schedule_free_adamw", marks=pytest.mark.full),
    pytest.param("zero2", 2, "soap", marks=pytest.mark.full), pytest.param("fsdp2", 3, "soap", marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "world", "base"), SAME)
def test_the_same_layout_goes_on_bit_by_bit(ranks: Any, tmp_path: Path, kind: str, world: int, base: str) -> None:
    dtype = "bf16" if kind in ("zero2", "zero3") else "fp32"
    assert law_4(ranks, tmp_path, (kind, world), (kind, world), base=base, dtype=dtype) == 0.0


FRAMEWORK = [
    (("plain", 1), ("fsdp2", 3), "adamw"), (("fsdp2", 3), ("ddp", 2), "adamw"), (("ddp", 2), ("hsdp", 2), "drifting"),
    (("hsdp", 2), ("fsdp2", 3), "adamw"), (("fsdp2", 3), ("fsdp2", 2), "drifting"),
    (("fsdp2", 2), ("plain", 1), "adamw"), (("plain+scalar", 1), ("ddp+scalar", 2), "adamw"),
    (("fsdp2", 3), ("ddp", 2), "lamb"), (("ddp", 2), ("fsdp2", 3), "lars"), (("hsdp", 2), ("fsdp2", 3), "muon"),
    (("ddp", 2), ("fsdp2", 3), "schedule_free_adamw"),
    (("fsdp2", 3), ("ddp", 2), "soap"),
    pytest.param(("ddp", 2), ("hsdp", 4), "soap", marks=pytest.mark.full),
    pytest.param(("fsdp2", 2), ("ddp", 2), "sophia_g", marks=pytest.mark.full),
    pytest.param(("ddp", 2), ("fsdp2", 3), "sassha", marks=pytest.mark.full),
    pytest.param(("fsdp2", 3), ("ddp", 2), "adaptive_memory_adamw", marks=pytest.mark.full),
    pytest.param(("plain", 1), ("fsdp2", 3), "adahessian", marks=pytest.mark.full),
]  # fmt: skip
# Without weight decay: DeepSpeed decays what no sample uses, and torch leaves it as it is.
ZERO = [
    (("zero3", 2), ("fsdp2", 3), "undecayed"), (("fsdp2", 3), ("zero3", 2), "undecayed"),
    (("zero1", 3), ("zero2", 2), "undecayed"), (("zero2", 2), ("zero3+small", 3), "undecayed"),
    (("zero3", 2), ("plain", 1), "undecayed"), (("ddp", 2), ("zero1", 2), "undecayed"),
    (("zero3", 2), ("zero2", 3), "lars"), (("zero2", 3), ("fsdp2", 2), "lars-undecayed"),
    pytest.param(("zero1", 2), ("fsdp2", 3), "adaptive_memory_sgd-undecayed", marks=pytest.mark.full),
]  # fmt: skip


REMEMBERING = ("looksam", "friendly_sam", "ae_sam", "sampa", "entropy_sgd", "momentum_sam")


@pytest.mark.parametrize("method", REMEMBERING)
@pytest.mark.parametrize(("saved", "loaded"), [(("fsdp2", 3), ("ddp", 2))])
def test_what_a_method_remembers_goes_on(ranks: Any, tmp_path: Path, saved: Any, loaded: Any, method: str) -> None:
    assert law_4(ranks, tmp_path, saved, loaded, dtype="fp64", method=method) <= 1e-11


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.full) for m in REMEMBERING])
def test_what_a_method_remembers_goes_on_under_zero(ranks: Any, tmp_path: Path, method: str) -> None:
    assert law_4(ranks, tmp_path, ("zero3", 2), ("zero2", 3), method=method) <= 1e-6
    assert law_4(ranks, tmp_path / "same", ("zero2", 2), ("zero2", 2), method=method) == 0.0


@pytest.mark.parametrize(("saved", "loaded", "base"), FRAMEWORK)
def test_another_layout_goes_on_in_fp64(ranks: Any, tmp_path: Path, saved: Any, loaded: Any, base: str) -> None:
    # fp64, because Adam divides the noise of another order of summation by itself
    assert law_4(ranks, tmp_path, saved, loaded, base=base, dtype="fp64") <= 1e-11


@pytest.mark.parametrize(("saved", "loaded", "base"), ZERO)
def test_another_stage_goes_on_within_rounding(ranks: Any, tmp_path: Path, saved: Any, loaded: Any, base: str) -> None:
    assert law_4(ranks, tmp_path, saved, loaded, base=base) <= 1e-6


@pytest.mark.parametrize(("saved", "loaded"), [(("zero3+small", 2), ("fsdp2", 3)), (("fsdp2", 3), ("zero2", 2))])
def test_every_number_of_the_state_arrives(ranks: Any, tmp_path: Path, saved: Any, loaded: Any) -> None:
    before, after = (
        ranks(world).run(CASES + "transfer", path=str(tmp_path), kind=kind) for kind, world in (saved, loaded)
    )
    assert before[0]["calls"] == 3 and before[0]["steps"] == [3.0]
    assert all(found == before[0] for found in after)
