"""One process: the format on disk, damaged checkpoints, retention, snapshots, what a resume restores and refuses."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.checkpoint import Checkpointer, latest
from elastic_lsopt.checkpoint.planner import share_out
from elastic_lsopt.errors import StaleWeights, Unsupported, UserError

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


class Net(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.a = nn.Linear(4, width)
        self.gain = nn.Parameter(torch.tensor(0.5))  # without dimensions
        self.register_buffer("seen", torch.zeros(2, 3, dtype=torch.int64).t())  # not contiguous
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.gain


def engine(width: int = 5, base: Any = torch.optim.AdamW, **more: Any) -> lso.Engine:
    torch.manual_seed(width)
    model = Net(width)
    backend = Replicated(model.named_parameters(), base(model.named_parameters(), lr=0.1, **more), model=model)
    return lso.Engine(backend, lso.SAM(rho=0.1), loss_fn=lambda m, x: m(x).square().mean())


def train(made: lso.Engine, steps: int = 1) -> None:
    for _ in range(steps):
        made.train_batch([torch.ones(2, 4)])


@pytest.fixture
def trained(tmp_path: Path) -> tuple[lso.Engine, Checkpointer]:
    """Two checkpoints, at steps 1 and 2."""
    made, checkpoints = engine(), Checkpointer(tmp_path)
    for step in (1, 2):
        train(made)
        checkpoints.save(made, step)
    assert checkpoints.wait()
    return made, checkpoints


def weights(made: lso.Engine) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in made.module.named_parameters()}


def test_the_format_is_what_it_says(trained: tuple[lso.Engine, Checkpointer], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-2"
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert {*manifest, "manifest.json"} == {p.name for p in path.iterdir()} == {
        "manifest.json", "contents.json", "rank-0.safetensors",
    }  # fmt: skip
    for name, metadata in manifest.items():
        data = (path / name).read_bytes()
        assert metadata == {"bytes": len(data), "blake2b": hashlib.blake2b(data).hexdigest()}
    tensors = load_file(path / "rank-0.safetensors")  # the library's own reader
    contents = json.loads((path / "contents.json").read_text())
    for name, weight in weights(trained[0]).items():
        assert torch.equal(tensors[f"weights/{name}@0"], weight.flatten())
        assert contents["tensors"][f"weights/{name}"] == {
            "dtype": "F32", "numel": weight.numel(), "chunks": [[0, weight.numel(), 0]],
        }  # fmt: skip
    assert "buffers/seen@0" in tensors and "buffers/scratch@0" not in tensors


DAMAGE: dict[str, Any] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "flipped": lambda file: file.write_bytes(bytes([*(d := bytearray(file.read_bytes()))[:-9], d[-9] ^ 1, *d[-8:]])),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["rank-0.safetensors", "contents.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_with_a_reason(
    trained: tuple[lso.Engine, Checkpointer], tmp_path: Path, caplog: Any, how: str, name: str
) -> None:
    DAMAGE[how](tmp_path / "checkpoint-2" / name)
    if (how, name) == ("flipped", "manifest.json"):
        name = ""  # the manifest no longer fits some file, or is unreadable
    fresh = engine()
    with caplog.at_level(logging.WARNING, "elastic_lsopt"):
        found = trained[1].resume(fresh, "auto")
    assert found is not None and found.step == 1 and fresh.clock.steps == 1
    assert len(caplog.messages) == 1
    assert "checkpoint-2" in caplog.messages[0] and name in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert latest(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(UserError, match=r"checkpoint-2 is no intact checkpoint: .*give the path") as error:
        trained[1].resume(fresh, tmp_path / "checkpoint-2")
    assert "\n" not in str(error.value)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        trained[1].resume(fresh, "auto")


def test_a_manifest_cannot_lead_out_of_its_folder(trained: tuple[lso.Engine, Checkpointer], tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-2" / "manifest.json"
    metadata = json.loads(file.read_text())
    (tmp_path / "outside.json").write_bytes((tmp_path / "checkpoint-2" / "contents.json").read_bytes())
    metadata["files"]["../outside.json"] = metadata["files"]["contents.json"]
    file.write_text(json.dumps(metadata))
    assert latest(tmp_path) == tmp_path / "checkpoint-1"


def test_where_there_is_nothing(tmp_path: Path, trained: tuple[lso.Engine, Checkpointer]) -> None:
    empty = Checkpointer(tmp_path / "runs" / "b")
    assert empty.resume(engine(), "auto") is None and empty.wait() is None and latest(tmp_path / "no") is None
    assert trained[1].resume(engine(), "none") is None
    with pytest.raises(UserError, match=r"manifest.json is missing; give .*checkpoint-2"):
        empty.resume(engine(), tmp_path)
    with pytest.raises(UserError, match="save_total_limit=0 must be >= 1"):
        Checkpointer(tmp_path, save_total_limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        Checkpointer(tmp_path / "file")


def test_retention_keeps_the_newest_and_never_deletes_the_one_just_saved(tmp_path: Path) -> None:
    made, checkpoints = engine(), Checkpointer(tmp_path, save_total_limit=2)
    for step in (10, 20, 30):
        checkpoints.save(made, step)
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30"]
    checkpoints.resume(made, tmp_path / "checkpoint-20")
    checkpoints.save(made, 25)  # 30 is of a branch that was left
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-25"]


def test_a_save_replaces_one_of_its_step_and_a_crash_inside_is_undone(tmp_path: Path) -> None:
    made, checkpoints = engine(), Checkpointer(tmp_path)
    checkpoints.save(made, 1)
    checkpoints.save(made, 1, extra={"again": True})
    found = checkpoints.resume(made)
    assert found is not None and found.extra == {"again": True}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    (tmp_path / "checkpoint-1").rename(tmp_path / ".old-checkpoint-1")  # what a crash between the renames leaves
    (tmp_path / ".tmp-checkpoint-1").mkdir()
    assert Checkpointer(tmp_path).resume(made) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_asynchronous_save_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    model = nn.Linear(2500, 2000)  # 20 MB: still being written when `save` returns
    base = torch.optim.SGD(model.named_parameters(), lr=1.0, momentum=0.9)
    made = lso.Engine(
        Replicated(model.named_parameters(), base, model=model), lso.Plain(), loss_fn=lambda m, x: m(x).sum()
    )
    made.train_batch([torch.ones(1, 2500)])
    before = model.weight.detach().clone(), base.state[model.weight]["momentum_buffer"].clone()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(made, 1)
    made.train_batch([torch.ones(1, 2500)])
    with torch.no_grad():
        model.weight.fill_(7.0)
    report = checkpoints.wait()
    assert report is not None and report.error is None and report.bytes > 40e6
    saved = load_file(tmp_path / "checkpoint-1" / "rank-0.safetensors")
    assert torch.equal(saved["weights/weight@0"].view(2000, 2500), before[0])
    assert torch.equal(saved["base/weight/momentum_buffer@0"].view(2000, 2500), before[1])


def test_everything_comes_back(trained: tuple[lso.Engine, Checkpointer], tmp_path: Path) -> None:
    made, checkpoints = trained
    made.param_groups[0].update(lr=0.03, betas=(0.8, 0.95), initial_lr=0.1)
    made.module.get_buffer("seen").copy_(torch.arange(6).view(3, 2))
    torch.manual_seed(99)
    checkpoints.save(made, 3, extra={"scheduler": {"last_epoch": 4}, "cursor": 17})
    drawn = torch.rand(3)
    wanted = weights(made)
    other = engine(base=torch.optim.Adam, amsgrad=True)
    train(other, 5)
    found = checkpoints.resume(other, tmp_path / "checkpoint-3")
    assert found is not None and found.same_world and found.extra == {"scheduler": {"last_epoch": 4}, "cursor": 17}
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(w, wanted[n]) for n, w in weights(other).items())
    assert other.module.get_buffer("seen").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert other.param_groups[0]["betas"] == (0.8, 0.95) and other.param_groups[0]["lr"] == 0.03
    for (name, p), q in zip(made.module.named_parameters(), other.module.parameters(), strict=True):
        mine, theirs = made.base.state[p], other.base.state[q]  # type: ignore[union-attr]
        assert mine.keys() == theirs.keys(), name  # amsgrad's maximum, which was not saved, is gone
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].shape == theirs[k].shape for k in mine)
    checkpoints.resume(other, tmp_path / "checkpoint-2", hyperparameters=False)
    assert other.param_groups[0]["lr"] == 0.03 and made.clock.samples == other.clock.samples == 4


def test_another_model_is_refused_before_anything_changes(trained: tuple[lso.Engine, Checkpointer]) -> None:
    other = engine(width=6)
    before = weights(other)
    with pytest.raises(UserError, match=r"parameter a.weight is \[5, 4\] in it and \[6, 4\] here") as error:
        trained[1].resume(other)
    assert "\n" not in str(error.value)
    assert all(torch.equal(w, before[n]) for n, w in weights(other).items()) and other.space.in_sync
    two = engine()
    two.base.add_param_group({"params": [("x", torch.zeros(1))]})  # type: ignore[union-attr]
    with pytest.raises(UserError, match="1 param groups, this optimizer 2"):
        trained[1].resume(two)


def test_state_that_cannot_be_resharded_is_refused(tmp_path: Path) -> None:
    made, checkpoints = engine(base=torch.optim.Adafactor), Checkpointer(tmp_path)
    train(made)
    with pytest.raises(Unsupported, match=r"'row_var' of parameter a.weight is a tensor of shape \(5, 1\)"):
        checkpoints.save(made, 1)
    made = engine()
    made.base.state["global"] = {"mean": 1.0}  # type: ignore[union-attr, index]
    with pytest.raises(Unsupported, match="keeps state under 'global'"):
        checkpoints.save(made, 1)


def test_no_save_inside_a_displaced_pass(tmp_path: Path) -> None:
    made, checkpoints = engine(), Checkpointer(tmp_path)
    with made.space.perturbed(made.space.zeros()), pytest.raises(StaleWeights, match="inside a perturbed pass"):
        checkpoints.save(made, 1)
    assert list(tmp_path.iterdir()) == []


def test_replicas_share_the_work() -> None:
    everyone = [("a", 0, 100), ("b", 0, 60), ("c", 0, 50), ("d", 0, 10)]
    shares = share_out([everyone, everyone])
    assert sorted([*shares[0], *shares[1]]) == everyone and not shares[0] & shares[1]
    assert {sum(c[2] for c in s) for s in shares} == {110}
    halves = [[("a", 0, 50)], [("a", 50, 50)]]
    assert share_out([*halves, *halves])[:2] == [{("a", 0, 50)}, {("a", 50, 50)}]
