"""What the pictures draw: densities, outliers, curves and ranks against closed forms and the files' own numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_lsopt.probes.presets import STUDIED
from elastic_lsopt.report.pictures import draw_over_training as over_training
from elastic_lsopt.report.pictures import draw_spectrum as spectrum
from elastic_lsopt.report.pictures import draw_study as study_pictures
from elastic_lsopt.report.pictures import draw_surface as surface
from elastic_lsopt.report.pictures import draw_trajectory as trajectory
from elastic_lsopt.report.pictures.style import plain
from elastic_lsopt.report.run import Run
from tests.report import synthetic
from tests.report.synthetic import OUTLIERS, SIZE, plane, steps, study

pytestmark = pytest.mark.fast


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, in place of files."""
    figures: list[Any] = []
    for module in (spectrum, surface, trajectory, over_training, study_pictures):
        monkeypatch.setattr(module, "save", lambda figure, target: figures.append(figure))
    return figures


def run(**probes: Any) -> Run:
    """A run of one step that says this, and of another 10 samples later that says the same."""
    return Run("run", [{"step": i, "samples": 10 * i, "lr": 0.1, "batch": 8, "probes": probes} for i in (1, 2)])


def curves(axes: Any) -> dict[str, np.ndarray]:
    """Label -> its points."""
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_density_integrates_to_one_and_has_the_moments_of_its_ritz_values() -> None:
    """Of the Gaussians' sum: mean sum w x, second moment sum w x^2 + sigma^2."""
    ritz = [(np.array([-1.0, 0.5, 3.0]), np.array([0.2, 0.5, 0.3])), (np.array([0.0, 2.0]), np.array([0.9, 0.1]))]
    ritz.append((np.array([1.0]), np.array([1.0])))
    grid = np.linspace(-6, 8, 20_001)
    density = spectrum.broadened(ritz, grid, 0.3)
    means = [float((x * w).sum()) for x, w in ritz]
    squares = [float((x**2 * w).sum()) for x, w in ritz]
    assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-9)
    assert np.trapezoid(density * grid, grid) == pytest.approx(np.mean(means), rel=1e-9)
    assert np.trapezoid(density * grid**2, grid) == pytest.approx(np.mean(squares) + 0.09, rel=1e-9)


@pytest.mark.parametrize(
    ("planted", "vectors"),
    [(OUTLIERS, 1), (OUTLIERS, 4), ((), 4), ((38.0,), 1), ((38.0,), 2), ((-30.0, 12.5, 38.0), 3)],
)
def test_outliers_are_found_and_nothing_else(planted: tuple[float, ...], vectors: int) -> None:
    told = run(spectral_density=synthetic.spectrum(planted, vectors=vectors))
    ritz = spectrum.ritz_values(told.last("spectral_density"))
    span = max([*planted, 6.0]) - min([*planted, -1.5])
    found = spectrum.isolated_values(ritz, SIZE, 0.01 * span)
    assert sorted(found) == pytest.approx(sorted(planted))


def test_a_value_that_one_vector_alone_has_is_no_outlier() -> None:
    told = synthetic.spectrum((38.0,), vectors=3)
    told["nodes"][0][-1] = 34.0
    ritz = spectrum.ritz_values(run(spectral_density=told).last("spectral_density"))
    assert spectrum.isolated_values(ritz, SIZE, 0.395) == []


def test_density_picture_marks_outliers_and_ends_below_one_eigenvalue(drawn: list[Any], tmp_path: Path) -> None:
    told = run(spectral_density=synthetic.spectrum(OUTLIERS), top_eigenvalues={"eigenvalues": [38.0, None, 17.0]})
    assert spectrum.draw_density(told, tmp_path) is not None
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    points = curves(axes)
    assert sorted(points["isolated Ritz values (4)"][:, 0]) == pytest.approx(sorted(OUTLIERS))
    assert points["largest eigenvalues (2)"][0, 0] == 38.0
    low, high = min(min(n) for n in synthetic.spectrum(OUTLIERS)["nodes"]), 38.0
    sigma = 0.01 * (high - low)
    assert axes.get_ylim()[0] == pytest.approx(0.1 / (SIZE * sigma * math.sqrt(2 * math.pi)))


def test_stability_line_is_two_over_the_rate_and_eigenvalues_are_the_files(drawn: list[Any], tmp_path: Path) -> None:
    rows = steps(40, 10)
    assert spectrum.draw_eigenvalues(Run("run", rows), tmp_path) is not None
    top, below = drawn[0].axes
    points = curves(top)
    assert points["2/η"].tolist() == [[row["samples"], 2 / row["lr"]] for row in rows]
    said = [row for row in rows if "probes" in row]
    for i in range(3):
        expected = [[row["samples"], row["probes"]["top_eigenvalues"]["eigenvalues"][i]] for row in said]
        # an errorbar's line itself has no label
        assert any(line.get_xydata().tolist() == expected for line in top.lines)
    threshold = [[row["samples"], row["probes"]["edge_of_stability"]["threshold"]] for row in said]
    assert curves(below)["threshold"].tolist() == threshold
    for axes in (top, below):
        for axis in (axes.get_ylim(), axes.get_xlim()):
            assert axis[0] < axis[1]


@pytest.mark.parametrize("rate", [1e-4, 0.05, 10.0])
def test_eigenvalues_and_the_line_are_both_in_view(drawn: list[Any], tmp_path: Path, rate: float) -> None:
    told = [
        {"step": i, "samples": i, "lr": rate, "probes": {"lambda_max": {"eigenvalues": [38.0, -2.0]}}} for i in (1, 2)
    ]
    spectrum.draw_eigenvalues(Run("run", told), tmp_path)
    low, high = drawn[0].axes[0].get_ylim()
    assert low < -2.0 and high > 38.0
    assert low < 2 / rate < high


def test_surface_has_its_rows_along_beta(drawn: list[Any], tmp_path: Path) -> None:
    """losses[j][i] lies at alphas[i], betas[j]: here the loss grows with alpha, and less with beta."""
    alphas, betas = [0.0, 1.0, 2.0], [0.0, 5.0]
    told = {
        "alphas": alphas,
        "betas": betas,
        "losses": [alphas, [a + 0.1 for a in alphas]],
        "path": [[0.5, 4.0], [None, 1.0], [2.0, 0.0]],
    }
    assert surface.draw_surface(run(surface=told), tmp_path) == "Loss from 0 to 2.1 on the slice."
    axes = drawn[0].axes[0]
    lowest = axes.collections[0].get_paths()[0].vertices
    assert lowest[:, 0].max() < 0.2 and lowest[:, 1].min() == 0.0 and len(lowest[lowest[:, 0] == 0.0]) >= 2
    assert lowest[lowest[:, 1] == 0.0][:, 0].max() > lowest[lowest[:, 1] > 2.0][:, 0].max()
    assert curves(axes)["trajectory"].tolist() == [[0.5, 4.0], [2.0, 0.0]]


@pytest.mark.parametrize(
    "bad",
    [
        {"losses": [[1.0, 2.0]]}, {"losses": [[None] * 21] * 17}, {"alphas": [0.0]}, {"losses": None},
        {"losses": [[1.0] * 21] * 16}, {"betas": []},
    ],
)  # fmt: skip
def test_a_surface_that_does_not_fit_its_grid_is_not_drawn(drawn: list[Any], tmp_path: Path, bad: Any) -> None:
    words = surface.draw_surface(run(surface=plane() | bad), tmp_path)
    assert (words is None) == (drawn == [])
    if "betas" not in bad:
        assert words is None


@pytest.mark.parametrize("betas", [None, [], [0.0]])
@pytest.mark.parametrize("nested", [False, True])
def test_a_line(drawn: list[Any], tmp_path: Path, betas: Any, nested: bool) -> None:
    told = {"alphas": [-1, 0, 1], "betas": betas, "losses": [[3.0, None, 2.0]] if nested else [3.0, None, 2.0]}
    assert surface.draw_surface(run(surface=told), tmp_path) is not None
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[-1, 3], [1, 2]]


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (0.0, 0.0), (-3.0, 8.0), (2.0, 11.0), (0.1, 5e4), (1.0, 1 + 1e-15)]
)
def test_contour_levels_rise_and_hold_all_losses(low: float, high: float) -> None:
    levels = surface.contour_levels(low, high)
    assert (np.diff(levels) > 0).all()
    assert levels[0] <= low and levels[-1] >= high


def test_connectivity(drawn: list[Any], tmp_path: Path) -> None:
    told = {"ts": [0, 0.5, 1], "line": [1, 3, 1], "curve": [1, 1.2, 1], "barrier": 2.0}
    assert surface.draw_connectivity(run(mode_connectivity=told), tmp_path) == "Barrier height 2 nats."
    points = curves(drawn[0].axes[0])
    assert points["straight line"][:, 1].tolist() == [1, 3, 1]
    assert points["trained curve"][:, 1].tolist() == [1, 1.2, 1]


def test_bands_are_one_standard_error(drawn: list[Any], tmp_path: Path) -> None:
    told = run(lpf={"value": 2.0, "standard_error": 0.25}, gradient_norm={"value": 3.0}, trace={"value": None})
    assert over_training.draw_measures(told, tmp_path) == "At the end: LPF measure 2, gradient norm 3."
    lpf, gradient = drawn[0].axes
    band = lpf.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.75, 2.25)
    assert not gradient.collections


def test_noise_scale_lies_beside_the_batch_that_was_used(drawn: list[Any], tmp_path: Path) -> None:
    told = run(noise_scale={"value": 30.0, "standard_error": 50.0, "critical_batch": 60.0})
    assert over_training.draw_noise(told, tmp_path) == "Noise scale 30 samples at the end, the batch used 8."
    (axes,) = drawn[0].axes
    points = curves(axes)
    assert points["critical batch"][:, 1].tolist() == [60, 60]
    assert points["batch used"].tolist() == [[10, 8], [20, 8]]
    assert axes.collections[0].get_paths()[0].vertices[:, 1].min() > 0  # on a log scale


def test_angles_in_degrees_from_radians_or_the_cosine(drawn: list[Any], tmp_path: Path) -> None:
    trajectory.draw_motion(run(trajectory={"angle": math.pi / 3, "cosine": -1.0}), tmp_path)
    trajectory.draw_motion(run(trajectory={"cosine": -1.0 - 1e-12}), tmp_path)
    assert drawn[0].axes[0].lines[0].get_ydata() == pytest.approx([60, 60])
    assert drawn[1].axes[0].lines[0].get_ydata() == pytest.approx([180, 180])


@pytest.mark.parametrize(
    "told",
    [
        {"alignment": [0.5, -0.25]},
        {"alignment": {"update": [0.5, -0.25]}},
        {"update_alignment": {"cosines": [0.5, -0.25], "share": 0.3}, "gradient_alignment": None},
    ],
)
def test_alignment_without_its_sign(drawn: list[Any], tmp_path: Path, told: Any) -> None:
    trajectory.draw_alignment(run(trajectory=told), tmp_path)
    (axes,) = drawn[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.5], [0.25, 0.25]]
    assert "update" in axes.get_title(loc="left")


def test_few_parameters_keep_their_rows() -> None:
    table = trajectory.by_module([{"a.w": 1e-3, "b": 0.0}, {"a.w": 2e-3, "c": 4e-3}])
    assert list(table) == ["a.w", "b", "c"]
    assert table["a.w"] == pytest.approx([1e-3, 2e-3])
    assert np.isnan(table["b"]).all() and np.isnan(table["c"][0])


def test_many_parameters_go_together_by_module_as_geometric_means() -> None:
    told = {f"layer{i}.{part}": 1e-3 * scale for i in range(30) for part, scale in (("w", 1.0), ("b", 100.0))}
    table = trajectory.by_module([told])
    assert list(table) == [f"layer{i}" for i in range(30)]
    assert all(row == pytest.approx([1e-2]) for row in table.values())
    deep = {f"model.layers.{i}.{part}.w": 1e-3 for i in range(96) for part in ("attention", "mlp")}
    table = trajectory.by_module([deep])
    assert list(table) == [f"model.layers.{i}" for i in range(0, 96, 2)]
    flat = trajectory.by_module([{f"p{i}": 1.0 for i in range(1000)}])
    assert 20 <= len(flat) <= trajectory.MOST_ROWS


def test_heat_map_has_the_files_ratios(drawn: list[Any], tmp_path: Path) -> None:
    rows = steps(40, 10, parameters=["b", "a"])
    trajectory.draw_ratios(Run("run", rows), tmp_path)
    axes = drawn[0].axes[0]
    said = [row["probes"]["trajectory"]["update_to_weight"] for row in rows if "probes" in row]
    expected = [[ratios[name] for ratios in said] for name in ("b", "a")]
    assert axes.collections[0].get_array().reshape(2, 4).tolist() == expected
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert axes.yaxis_inverted()


def test_ranking_falls_and_says_what_is_not_told_from_zero() -> None:
    told = {"a": {"tau": 0.1, "interval": [-0.1, 0.3]}, "b": {"tau": None}, "c": {"tau": 0.6, "interval": [0.5, 0.7]}}
    ranks = study_pictures.ranking(Run("study", study={"measures": told | {"d": None}}))
    assert [rank.name for rank in ranks] == ["c", "a", "b", "d"]
    assert [rank.sure for rank in ranks] == [True, False, False, False]


def test_no_label_of_a_studys_own_measures_is_cut(drawn: list[Any], tmp_path: Path) -> None:
    told = {name: {"tau": 0.1, "interval": [-0.1, 0.3]} for name in STUDIED}
    study_pictures.draw_ranking(Run("study", study={"measures": told}), tmp_path)
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert len(labels) == len(STUDIED) and not [label for label in labels if "…" in label]


def test_scatter_has_a_point_a_model_in_the_order_of_the_ranking(drawn: list[Any], tmp_path: Path) -> None:
    told = study(12)
    study_pictures.draw_scatter(Run("study", study=told), tmp_path)
    order = [rank.name for rank in study_pictures.ranking(Run("study", study=told))]
    for axes, name in zip(drawn[0].axes, order, strict=True):
        assert axes.lines[0].get_xydata().tolist() == [[model[name], model["gap"]] for model in told["models"]]


def test_long_and_odd_names_are_shown_as_they_are() -> None:
    assert plain("a$b\n") == r"a\$b "
    assert len(plain("x" * 500, 40)) == 40
    assert plain("abc" + "x" * 500 + "end", 40).endswith("end")
