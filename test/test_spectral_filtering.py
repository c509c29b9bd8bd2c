"""Zeta-based spectral filtering, as scikit-learn has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn comes with nnunetv2, which the wheel does without")

from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from ensemble.types import AnyArray
from training.spectral.filtering import ZetaFilter
from training.spectral.gaussians import gaussian


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_to_object_to() -> None:
    for estimator, check in estimator_checks_generator(ZetaFilter()):
        if "array_api" not in str(check):  # asks for an environment variable
            check(estimator)


def classes(n: int, seed: int = 0) -> tuple[AnyArray, AnyArray, Any]:
    """Two classes that differ along the first modes of a power law in 60 dimensions."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    apart = 1.5 * np.arange(1, 61) ** -1.0
    return gaussian(np.arange(1, 61) ** -1.5, n, draw) + labels[:, None] * apart, labels, draw


def test_it_stands_in_a_pipeline_and_keeps_stable_modes_of_unit_variance() -> None:
    samples, labels, _ = classes(200)
    held, truth, _ = classes(400, seed=1)
    rule = make_pipeline(ZetaFilter(), NearestCentroid()).fit(samples, labels)
    assert rule.score(held, truth) > 0.7
    chosen = rule[0]
    assert 2 <= chosen.n_modes_ <= 10
    assert chosen.power_law_ is not None
    assert chosen.power_law_.exponent == pytest.approx(1.5, abs=0.4)
    modes = chosen.transform(held[truth == 0])
    assert modes.std(axis=0) == pytest.approx(1, rel=0.3)
    assert list(chosen.get_feature_names_out()) == [f"mode{k}" for k in range(chosen.n_modes_)]


def test_classes_do_not_count_as_spread() -> None:
    """Far apart, they would be the first mode."""
    samples, labels, _ = classes(200)
    samples[labels == 1] += 100
    with_classes, without = ZetaFilter().fit(samples, labels), ZetaFilter().fit(samples)
    assert with_classes.eigenvalues_[0] < 3
    assert without.eigenvalues_[0] > 1000


def test_numbers_to_be_predicted_are_no_classes() -> None:
    samples, _, draw = classes(60)
    chosen = ZetaFilter().fit(samples, draw.standard_normal(60))
    assert chosen.n_modes_ == ZetaFilter().fit(samples).n_modes_


def test_as_many_modes_as_asked_for() -> None:
    samples, labels, _ = classes(40)
    assert ZetaFilter(modes=7, power_law=False).fit_transform(samples, labels).shape == (40, 7)
    assert ZetaFilter(modes=1000).fit(samples, labels).n_modes_ == 38
