"""One network: what it is trained on, when training ends, and that its numbers are its own."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.probes.catalogue import MEASURES, Measure
from elastic_lsopt.probes.presets import STUDIED
from elastic_lsopt.study.cell import Task, data, network, train_and_measure
from elastic_lsopt.study.grid import Cell

CELL = Cell(
    width=16, depth=1, batch_size=32, learning_rate=0.1, weight_decay=0.0, momentum=0.9, label_noise=0.0, seed=0
)
CONFIG = StudyConfig(output_dir="-", eval_fraction=0.8, stop_loss=0.1, max_epochs=50)


def test_noise_gives_a_share_of_the_training_labels_another_class_and_no_test_label():
    (clean, test, classes), *noisy = (data(CONFIG, noise) for noise in (0.0, 0.1, 0.5))
    assert (classes, clean.x.shape[1], clean.x.dtype) == (10, 64, torch.float64)
    wrong = [(train.labels != clean.labels) for train, _, _ in noisy]
    assert [int(w.sum()) for w in wrong] == [round(share * len(clean.labels)) for share in (0.1, 0.5)]
    assert (wrong[1] | ~wrong[0]).all()  # what is wrong at a low level is so at a higher one, and as wrong
    assert (noisy[0][0].labels[wrong[0]] == noisy[1][0].labels[wrong[0]]).all()
    for train, held_out, _ in noisy:
        assert (held_out.labels == test.labels).all() and (train.x == clean.x).all()
    other = data(StudyConfig(output_dir="-", eval_fraction=0.8, seed=1), 0.1)[0]
    assert (other.labels != noisy[0][0].labels).any()


def test_depth_and_width():
    model = network(64, 7, 3, 10)
    assert [p.shape for p in model.parameters() if p.dim() == 2] == [(7, 64), (7, 7), (7, 7), (10, 7)]


def test_a_network_is_a_function_of_its_settings():
    first, again = (train_and_measure(Task(CELL, CONFIG, ("weight_norm", "trace"))) for _ in range(2))
    for result in (first, again):
        assert result.pop("measure_seconds") and result.pop("cpu_seconds")
    assert first == again
    assert first["converged"] and first["train_loss"] <= 0.1
    assert first["gap"] == pytest.approx(first["test_error"] - first["train_error"])
    assert first["loss_gap"] == pytest.approx(first["test_loss"] - first["train_loss"])
    other = train_and_measure(Task(Cell(**CELL.settings() | {"seed": 1}), CONFIG, ("weight_norm",)))
    assert other["measures"]["weight_norm"] != first["measures"]["weight_norm"]


def test_training_is_torchs_sgd(monkeypatch):
    """Against the update rule written out, for the epochs that it took."""
    cell = Cell(**CELL.settings() | {"weight_decay": 0.01, "momentum": 0.5})
    seen = {}
    keep = Measure(lambda m: seen.update(w=m.space.weights.clone().tensors) or {"value": 0.0}, {})
    monkeypatch.setitem(MEASURES, "keep", keep)
    config = StudyConfig(output_dir="-", eval_fraction=0.8, stop_loss=1.0)
    result = train_and_measure(Task(cell, config, ("keep",)))
    train, _, _ = data(config, 0.0)
    torch.manual_seed(0)
    model = network(64, 16, 1, 10).double()
    weights, momenta = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    order = torch.Generator().manual_seed(0)
    for _ in range(result["epochs"]):
        for chosen in torch.randperm(len(train.labels), generator=order).split(32):
            loss = torch.nn.functional.cross_entropy(model(train.x[chosen]), train.labels[chosen])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, m, g in zip(weights, momenta, gradients, strict=True):
                    m.mul_(0.5).add_(g + 0.01 * w)
                    w.sub_(0.1 * m)
    for w, kept in zip(weights, seen["w"], strict=True):
        torch.testing.assert_close(kept, w.detach().flatten(), rtol=1e-12, atol=1e-13)


def test_one_that_does_not_converge_is_not_measured_and_says_why():
    short = StudyConfig(output_dir="-", eval_fraction=0.8, stop_loss=1e-6, max_epochs=2)
    result = train_and_measure(Task(CELL, short, ("trace",)))
    assert not result["converged"] and result["measures"] == {"trace": None}
    assert "after 2 epochs, above stop_loss=1e-06" in result["reasons"]["trace"]
    wild = Cell(**CELL.settings() | {"learning_rate": 1e6})
    result = train_and_measure(Task(wild, CONFIG, ("trace",)))
    assert (not result["converged"] and result["train_loss"] is None) or result["train_loss"] > 1


def test_a_measure_that_fails_is_null_with_its_reason_and_the_others_go_on(monkeypatch):
    def fails(_):
        raise ArithmeticError("not\nsmooth")

    monkeypatch.setitem(MEASURES, "fails", Measure(fails, {}))
    monkeypatch.setitem(MEASURES, "endless", Measure(lambda _: {"value": None}, {}))
    result = train_and_measure(Task(CELL, CONFIG, ("fails", "endless", "weight_norm")))
    assert result["measures"]["weight_norm"] > 0
    assert result["measures"]["fails"] is result["measures"]["endless"] is None
    assert result["reasons"] == {"fails": "ArithmeticError: not smooth", "endless": "it is nan"}


def test_all_measures_are_numbers_and_leave_the_weights_alone(monkeypatch):
    names, seen = STUDIED, []
    monkeypatch.setitem(
        MEASURES,
        "weights",
        Measure(lambda m: seen.append([t.clone() for t in m.space.weights.tensors]) or {"value": 0.0}, {}),
    )
    result = train_and_measure(Task(CELL, CONFIG, ("weights", *names, "weights")))
    assert result["reasons"] == {}
    assert set(result["measures"]) == {*names, "weights"}
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
