"""The tables of the spectral page: rules that learn of few windows, small encoders, specks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn comes with nnunetv2, which the wheel does without")

from ensemble.errors import UsageError
from ensemble.spectral.diagnosis import FeatureSample
from ensemble.spectral.embeddings import CaseEmbeddings, EmbeddedRegion, RegionKind
from ensemble.spectral.theory import auc
from ensemble.types import AnyArray
from training.members import MEMBERS
from training.spectral.components import learn, small_disputed_of
from training.spectral.few_shot import FILTER, OTHERS, filter_rule, format_table, measure
from training.spectral.gaussians import gaussian
from training.spectral.kept import kept
from training.spectral.modalities import small_embeddings
from training.spectral.small import IMAGES, spec_of


def classes(n: int, seed: int) -> tuple[AnyArray, AnyArray]:
    draw, spectrum = np.random.default_rng(seed), np.arange(1, 31) ** -1.5
    return gaussian(spectrum, n, draw), gaussian(spectrum, n, draw) + 1.5 * np.arange(1, 31) ** -1.0


@pytest.mark.parametrize("name", [FILTER, *OTHERS])
def test_every_rule_tells_classes_that_are_apart(name: str) -> None:
    learnt, held = classes(100, 0), classes(400, 1)
    rule = filter_rule(*learnt)[0] if name == FILTER else OTHERS[name](*learnt)
    assert auc(held[0] @ rule, held[1] @ rule) > 0.8


@pytest.mark.parametrize("n", [3, 10])
def test_every_rule_takes_fewer_samples_than_dimensions(n: int) -> None:
    learnt = classes(n, 0)
    for rule in (filter_rule(*learnt)[0], *(rule(*learnt) for rule in OTHERS.values())):
        assert np.isfinite(rule).all()


def test_the_table_marks_what_can_not_be_told_from_the_best() -> None:
    first, second = classes(60, 0)
    cases = np.arange(60) // 2
    rows = measure(FeatureSample(first, cases), FeatureSample(second, cases), (10,), draws=3)
    assert [row.n for row in rows] == [10, 96]
    lines = format_table(rows).split("\n")
    assert len(lines) == 4
    assert all("**" in line for line in lines[2:])


def speck(features: float, true: bool, draw: np.random.Generator) -> CaseEmbeddings:
    stage = (features + draw.standard_normal((2, 5))).astype(np.float32)
    return CaseEmbeddings(
        "a",
        (EmbeddedRegion(RegionKind.BRAIN, 1.0), EmbeddedRegion(RegionKind.SMALL_DISPUTED, 0.01, true=true)),
        {"m": (stage,)},
    )


def test_specks_that_differ_are_told_apart_and_too_few_teach_nothing() -> None:
    draw = np.random.default_rng(0)
    cases = [speck(3.0 * (at % 2), bool(at % 2), draw) for at in range(40)]
    specks = small_disputed_of(cases, ("m", "m"), 1)
    assert specks.features.shape == (40, 10)
    rule = learn(specks)
    assert rule is not None
    assert ((rule.scores(specks) > 0) == specks.true).mean() > 0.9
    assert learn(small_disputed_of(cases[:2], ("m",), 1)) is None


def test_small_encoders_differ_in_what_they_see_alone() -> None:
    specs = [spec_of(name) for name in IMAGES]
    assert [spec.images for spec in specs] == [1, 2, 3]
    assert [len(spec.channels) for spec in specs] == [5, 10, 15]
    assert [MEMBERS[name].images for name in ("iso3d", "slice2d", "flair3d")] == [2, 2, 3]


def test_what_is_not_there_yet_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no embeddings"):
        kept(Namespace(folder=tmp_path, simulated=10))
    with pytest.raises(UsageError, match="small encoders are missing"):
        small_embeddings(tmp_path, 10, tmp_path, tmp_path, ())
