"""A study's YAML: its numbers, its lines, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lsopt.config.study import Grid, read_study
from elastic_lsopt.errors import UserError
from elastic_lsopt.study.grid import cells
from elastic_lsopt.study.measures import chosen

pytestmark = pytest.mark.fast

SHIPPED = Path(__file__).parents[2] / "configs/study-digits.yaml"
TEXT = """\
output_dir: runs/s
grid:
  width: [8, 16]
  learning_rate: [1e-1, 0.5]
"""


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read = read_study(path, overrides)
        with read.file.located():
            chosen(read.config)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path}:", "")


def test_a_file_and_its_overrides(tmp_path):
    (tmp_path / "s.yaml").write_text(TEXT)
    config = read_study(tmp_path / "s.yaml", ["grid.depth=[1, 2, 3]", "workers=1", "stop_loss=1e-3"]).config
    assert config.grid == Grid(width=(8, 16), depth=(1, 2, 3), learning_rate=(0.1, 0.5))
    assert (config.workers, config.stop_loss, config.output_dir) == (1, 1e-3, "runs/s")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wokers: 2\n", "5: unknown key 'wokers'; did you mean 'workers'?"),
        ("  widht: [1]\n", "5: unknown key 'grid.widht'; did you mean 'width'?"),
        ("  depth: []\n", "5: grid.depth is empty; give at least one value, or leave the key out."),
        ("  depth: 2\n", "5: grid.depth=2 must be a list, such as [2]."),
        ("  depth: [1, 2, 1]\n", "5: grid.depth=[1, 2, 1] holds a value twice; keep one."),
        ("  depth: [1, 0]\n", "5: grid.depth=0 must be greater than or equal to 1."),
        ("  momentum: [1.0]\n", "5: grid.momentum=1.0 must be less than 1."),
        ("  seed: [a]\n", "5: grid.seed='a' must be a valid integer."),
        ("workers: 0\n", "5: workers=0 must be greater than or equal to 1."),
        ("timeout_s: -1\n", "5: timeout_s=-1 must be greater than 0."),
        ("eval_fraction: 1.0\n", "5: eval_fraction=1.0 must be less than 1."),
        ("confidence: 95\n", "5: confidence=95 must be less than 1."),
        ("dataset: cifar\n", "5: dataset='cifar' must be 'digits'."),
        ("measures: []\n", "5: measures is empty; give at least one value, or leave the key out."),
        ("measures: [lpf, lpf]\n", "5: measures=['lpf', 'lpf'] holds a name twice; keep one."),
        ("measures: [lpf, fischer_rao]\n", "5: measure 'fischer_rao' is unknown; did you mean 'fisher_rao'?"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path, text, expected):
    assert refusal(tmp_path, TEXT + text) == expected


def test_a_missing_folder_and_a_grid_that_is_none(tmp_path):
    assert refusal(tmp_path, "workers: 2\n").endswith("output_dir is missing: the folder that the study writes to.")
    assert refusal(tmp_path, "output_dir: a\ngrid: 3\n") == (
        "2: grid=3 must be a mapping of hyper-parameters to lists."
    )
    assert refusal(tmp_path, TEXT, "grid.depth=[x]") == (
        "command line, 'grid.depth=[x]': grid.depth='x' must be a valid integer."
    )


def test_the_shipped_study_varies_every_hyper_parameter_and_ranks_all_measures():
    config = read_study(SHIPPED).config
    assert all(len(getattr(config.grid, axis)) > 1 for axis in Grid.__dataclass_fields__ if axis != "seed")
    assert len(cells(config)) <= 150
    assert config.measures is None
