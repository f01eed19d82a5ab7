"""The grid's networks, and identities that stay the same from one machine and one start to the next."""

import pytest

from elastic_lsopt.config.study import Grid, StudyConfig
from elastic_lsopt.study.grid import Cell, cells

pytestmark = pytest.mark.fast

GRID = Grid(width=(8, 16), depth=(1, 2), learning_rate=(0.1, 0.2), seed=(0, 1, 2))


def test_all_combinations_the_last_axis_first():
    found = cells(StudyConfig(output_dir="x", grid=GRID))
    assert len(found) == len(set(found)) == 24
    assert [(c.width, c.depth, c.learning_rate, c.seed) for c in found[:4]] == [
        (8, 1, 0.1, 0), (8, 1, 0.1, 1), (8, 1, 0.1, 2), (8, 1, 0.2, 0),
    ]  # fmt: skip


def test_an_identity_is_of_the_network_and_of_how_it_is_trained():
    config = StudyConfig(output_dir="x", grid=GRID)
    ids = [cell.id(config) for cell in cells(config)]
    assert len(set(ids)) == 24
    elsewhere = StudyConfig(
        output_dir="y", grid=Grid(width=(16, 8, 4), seed=(2, 1, 0), depth=(2, 1), learning_rate=(0.2, 0.1)),
        workers=7, measures=("trace",), bootstrap_draws=5,
    )  # fmt: skip
    assert set(ids) < {cell.id(elsewhere) for cell in cells(elsewhere)}
    for changed in ({"stop_loss": 0.02}, {"max_epochs": 9}, {"eval_fraction": 0.4}, {"seed": 1}):
        other = StudyConfig(output_dir="x", grid=GRID, **changed)
        assert not set(ids) & {cell.id(other) for cell in cells(other)}


def test_the_identity_of_one_network_is_frozen():
    cell = Cell(
        width=8, depth=1, batch_size=32, learning_rate=0.1, weight_decay=0.0, momentum=0.9, label_noise=0.1, seed=3
    )
    assert cell.id(StudyConfig(output_dir="x")) == "68940a2b6083"
    assert str(cell).startswith("width=8 depth=1 batch_size=32 learning_rate=0.1 ")
