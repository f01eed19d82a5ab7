"""A measure's name is the same number in a study, by the catalogue and in Python; presets have names of their own."""

from __future__ import annotations

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.probes.catalogue import MEASURES, ProbeContext, as_json, headline, measure
from elastic_lsopt.probes.presets import PRESETS, STUDIED
from elastic_lsopt.study.measures import chosen

pytestmark = pytest.mark.fast


def here() -> ProbeContext:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    batch = (torch.randn(8, 4).double(), torch.randint(0, 3, (8,)))
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    space, oracle = lso.attach(model, loss, [batch])
    return ProbeContext(space=space, oracle=oracle, batches=lambda: [oracle], samples=8, initial=space.zeros())


def number(name: str, s: ProbeContext) -> float:
    """The measure's one number there, as a study takes it."""
    return headline(as_json(MEASURES[name].ask(s)))


def test_lambda_max_is_of_the_hessian_and_its_preset_of_the_normalised_one() -> None:
    """Against lanczos by hand; the study gave the normalised one under the plain name."""
    s = here()
    plain = lso.probes.lanczos(s.space, s.oracle, k=1).eigenvalues[0]
    from elastic_lsopt.probes.flatness.filter_norms import normalised

    scaled = lso.probes.lanczos(s.space, s.oracle, k=1, of=normalised(s.space, s.oracle)).eigenvalues[0]
    assert number("lambda_max", s) == pytest.approx(plain, rel=1e-9)
    assert number("lambda_max_normalised", s) == pytest.approx(scaled, rel=1e-9)
    assert abs(plain - scaled) > 0.05 * plain


def test_what_a_study_measures_stands_in_the_catalogue() -> None:
    assert set(STUDIED) <= set(MEASURES) and chosen(StudyConfig(output_dir="-")) == STUDIED
    for name, (base, settings) in PRESETS.items():
        measure(base, settings)
        assert {**MEASURES[base].settings, **settings} == MEASURES[name].settings
    with pytest.raises(lso.UserError, match="edge_of_stability needs a learning rate"):
        chosen(StudyConfig(output_dir="-", measures=("edge_of_stability",)))


def test_without_the_start_its_distance_is_refused() -> None:
    from dataclasses import replace

    for name in ("pac_bayes", "pac_bayes_normalised", "distance_from_start"):
        with pytest.raises(lso.UserError, match="the training began with, and they are not known here"):
            MEASURES[name].ask(replace(here(), initial=None))
