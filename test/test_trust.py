"""The trust score: what it says of good, odd and empty masks, and that no reference of other weights is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, StubMember, phantom_arrays, phantom_case, write_image
from ensemble.batch.identity import describe_recipe
from ensemble.batch.reference import fit_reference
from ensemble.batch.summary import _trust as trust_columns
from ensemble.config import SHIPPED_WEIGHTS, ExtraOutputs, RunConfig
from ensemble.errors import InputRefused
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.files import file_sha256
from ensemble.inference.features import PooledFeatures
from ensemble.members.manifest import find_members
from ensemble.options import make_run_config, parse_options
from ensemble.outputs.closing_lines import closing_lines
from ensemble.outputs.report.page import render_case_page
from ensemble.outputs.segmented import SegmentedCase
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.prepare.case import PreparedCase
from ensemble.progress import SilentWatcher
from ensemble.trust.calibration import (
    ATYPICALITY_SCORES,
    Calibration,
    UsualRange,
    atypicality,
    atypicality_limits,
    conformal_quantile,
    expit,
)
from ensemble.trust.evidence import CaseEvidence, gather_evidence, measure_mask
from ensemble.trust.fit import fit_user_reference, out_of_fold_atypicality
from ensemble.trust.judge import Trust, TrustModel, judge
from ensemble.trust.reference import CALIBRATION, FOLDER, fit_references, read_references, write_references
from ensemble.trust.scores import compute_trust_scores
from ensemble.types import AnyArray, ProgressCallback
from json_schema import faults

REPORT = json.loads((REPOSITORY / "docs" / "report.schema.json").read_text(encoding="utf-8"))
DIGESTS = {name: {"fold_0/checkpoint_final.pth": name * 32} for name in "ab"}
DIMENSIONS = 30


class Seeing(StubMember):
    """A stub that tells features, too: a fixed place, and how far it is shifted from there."""

    def __init__(self, name: str, *, off: float = 0.0, level: float = 1.5) -> None:
        super().__init__(name, level=level)
        self._off = off

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        found = super().predict(case, settings, progress)
        at = np.full(DIMENSIONS, self._off, np.float32)
        return replace(found, features=PooledFeatures(at, at if found.mask.array.any() else None))


def usual(n: int = 40, seed: int = 0) -> list[CaseEvidence]:
    """What `n` cases like the phantom show: features about 0 along a few directions, its intensities."""
    draw = np.random.default_rng(seed)
    spread = np.concatenate([[1.0, 0.5, 0.3], np.full(DIMENSIONS - 3, 0.01)])
    phantom = _phantom_evidence()
    return [
        CaseEvidence(
            agreement=0.9,
            mask={"volume_ml": 10.0, "lesions": 1.0, "soft_dice": 0.9},
            whole={name: (spread * draw.standard_normal(DIMENSIONS)).astype(np.float32) for name in "ab"},
            lesion={name: (spread * draw.standard_normal(DIMENSIONS)).astype(np.float32) for name in "ab"},
            intensities={
                name: values * float(1 + 0.05 * draw.standard_normal()) for name, values in phantom.intensities.items()
            },
            quality={name: x + 0.1 * draw.standard_normal() for name, x in phantom.quality.items()},
            surroundings={name: x + 0.1 * draw.standard_normal() for name, x in phantom.surroundings.items()},
        )
        for _ in range(n)
    ]


def _phantom_evidence() -> CaseEvidence:
    ensemble = Ensemble(RunConfig(), InferenceSettings(), (), (Seeing("a"), Seeing("b")), 0.0)
    return gather_evidence(segment_raw(phantom_case(), ensemble, SilentWatcher()))


def calibration(**changes: object) -> Calibration:
    """Expects more where members agree; what is more than e^1 = 2.7 times as far as usual does not look so."""
    known = Calibration(
        DIGESTS,
        1.0,
        {"agreement": 1.0},
        0.9,
        0.2,
        dict.fromkeys(ATYPICALITY_SCORES, UsualRange(0.0, 1.0)),
        UsualRange(-2.0, -0.5),
        {"made": "2026-11-26"},
    )
    return replace(known, **changes)  # type: ignore[arg-type]


@pytest.fixture
def ensemble_of(tmp_path: Path, stub_ensemble: Callable[..., Ensemble]) -> Callable[..., Ensemble]:
    """Builds an ensemble of stubs beside whose weights references and a calibration lie."""
    write_references(fit_references(usual(), DIGESTS), calibration().as_json(), tmp_path)

    def build(*members: StubMember) -> Ensemble:
        return replace(stub_ensemble(*members, weights=tmp_path, trust=True), digests=DIGESTS)

    return build


def trust_of(ensemble: Ensemble) -> Trust:
    return judge(segment_raw(phantom_case(), ensemble, SilentWatcher()), ensemble)


def test_a_mask_on_which_members_agree_and_that_looks_as_usual_is_good(ensemble_of: Callable[..., Ensemble]) -> None:
    trust = trust_of(ensemble_of(Seeing("a"), Seeing("b")))
    assert (trust.verdict, trust.missing) == ("good", ())
    assert trust.expected_dice is not None
    assert trust.expected_dice > 0.9
    assert trust.interval == (pytest.approx(trust.expected_dice - 0.2), 1.0)
    assert trust.scores["agreement"] == 1
    assert trust.scores["spectral"] < 1


def test_noise_is_named_where_it_is_what_is_unusual(ensemble_of: Callable[..., Ensemble]) -> None:
    ensemble, raw = ensemble_of(Seeing("a"), Seeing("b")), phantom_case()
    for modality, image in raw.images.items():
        array = image.volume.array
        noisy = array * (1 + 0.1 * np.random.default_rng(1).standard_normal(array.shape)).astype(np.float32)
        raw = replace(raw, images={**raw.images, modality: replace(image, volume=image.volume.like(noisy))})
    trust = judge(segment_raw(raw, ensemble, SilentWatcher()), ensemble)
    assert trust.verdict == "poor"
    assert trust.scores["quality"] > 5
    assert "unusual: the noise of the" in trust.reasons.lower()


def test_members_that_disagree_make_a_mask_doubtful(ensemble_of: Callable[..., Ensemble]) -> None:
    trust = trust_of(ensemble_of(Seeing("a"), Seeing("b", level=2.24)))
    assert trust.scores["agreement"] < 0.6
    assert trust.verdict in ("check", "poor")
    assert any("Dice" in reason for reason in trust.why)


def test_features_far_from_all_references_make_any_mask_doubtful(ensemble_of: Callable[..., Ensemble]) -> None:
    for level in (1.5, 9.0):  # with a mask, and with an empty one
        trust = trust_of(ensemble_of(Seeing("a", off=50.0, level=level), Seeing("b", off=50.0, level=level)))
        assert trust.verdict == "poor"
        assert trust.scores["spectral"] > 10
        assert "encoders" in trust.why[0]


def test_of_an_empty_mask_no_dice_is_expected(ensemble_of: Callable[..., Ensemble]) -> None:
    trust = trust_of(ensemble_of(Seeing("a", level=9.0), Seeing("b", level=9.0)))
    assert (trust.verdict, trust.expected_dice, trust.interval) == ("good", None, None)
    assert trust.scores["agreement"] == 1
    assert "soft_dice" not in trust.scores


def test_references_of_other_weights_are_not_used_and_the_report_says_so(ensemble_of: Callable[..., Ensemble]) -> None:
    ensemble = ensemble_of(Seeing("a"), Seeing("b"))
    stale = replace(ensemble, digests={"a": DIGESTS["a"], "b": {"fold_0/checkpoint_final.pth": "0" * 32}})
    trust = trust_of(stale)
    assert "b: the reference was made with other weights" in trust.missing
    assert any("calibration was made with other members or weights" in reason for reason in trust.missing)
    assert (trust.verdict, trust.expected_dice) == (None, None)
    assert {"agreement", "spectral", "histogram"} <= set(trust.scores)  # of the member whose reference holds


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("a.safetensors", lambda content: content[:100]),
        ("a.safetensors", lambda content: b""),
        ("images.json", lambda content: content.replace(b"usual", b"usuel")),
        ("images.json", lambda content: content.replace(b'"surface":', b'"shoe size":')),
        ("images.json", lambda content: content.replace(b'"noise_dwi":', b'"depth":', 1)),
        ("calibration.json", lambda content: content.replace(b'"quality": {', b'"shoe size": {')),
        ("calibration.json", lambda content: content[:-20]),
        ("calibration.json", lambda content: content.replace(b'"slopes": {', b'"slopes": {"shoe size": 1,')),
        ("calibration.json", lambda content: content.replace(b'"residual": 0.2', b'"residual": Infinity')),
        ("calibration.json", lambda content: b"[]"),
    ],
)
def test_what_is_damaged_is_not_used_and_the_report_says_so(
    name: str, spoil: Callable[[bytes], bytes], ensemble_of: Callable[..., Ensemble], tmp_path: Path
) -> None:
    ensemble, path = ensemble_of(Seeing("a"), Seeing("b")), tmp_path / FOLDER / name
    path.write_bytes(spoil(path.read_bytes()))
    trust = trust_of(ensemble)
    assert len(trust.missing) == 1
    assert "damaged" in trust.missing[0] or "can't be read" in trust.missing[0]


@pytest.mark.parametrize("part", ["mean", "vectors", "values"])
def test_a_reference_whose_modes_do_not_fit_together_is_damaged(
    part: str, ensemble_of: Callable[..., Ensemble], tmp_path: Path
) -> None:
    ensemble, made = ensemble_of(Seeing("a"), Seeing("b")), fit_references(usual(), DIGESTS)
    cloud = made.members["a"].whole
    spoilt = {
        "mean": cloud.spectrum.mean[1:],
        "vectors": cloud.spectrum.vectors[1:],
        "values": 0 * cloud.spectrum.values,
    }
    wrong = replace(cloud, spectrum=replace(cloud.spectrum, **{part: spoilt[part]}))
    write_references(replace(made, members={"a": replace(made.members["a"], whole=wrong)}), None, tmp_path)
    trust = trust_of(ensemble)
    assert [reason.partition(" (")[0] for reason in trust.missing] == ["a: the reference is damaged"]
    assert "spectral" in trust.scores  # of the other member


@pytest.mark.parametrize("where", ["gather_evidence", "read_references", "compute_trust_scores"])
def test_what_goes_wrong_in_judging_costs_the_verdict_and_no_mask(
    where: str, ensemble_of: Callable[..., Ensemble], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    ensemble, raw = ensemble_of(Seeing("a"), Seeing("b")), phantom_case()
    monkeypatch.setattr(f"ensemble.trust.judge.{where}", broken)
    case = SegmentedCase.of(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble, ExtraOutputs())
    assert not list(faults(case.report, REPORT))
    told = case.report["trust"]
    assert (told["verdict"], told["expected_dice"], told["scores"]) == (None, None, {})
    assert told["missing"] == ["everything: judging failed (MemoryError: no room)"]
    assert "is not known" in render_case_page(case.report, case.result, None, case.trust)


def test_what_is_no_number_is_no_score() -> None:
    spoilt = replace(usual(1)[0], agreement=float("nan"), whole={"a": np.full(DIMENSIONS, np.nan, np.float32)})
    scores = compute_trust_scores(spoilt, fit_references(usual(), DIGESTS))
    assert not {"agreement", "spectral", "rest"} & set(scores)
    assert "histogram" in scores


def test_without_any_reference_the_plain_scores_are_there(
    tmp_path: Path, stub_ensemble: Callable[..., Ensemble]
) -> None:
    trust = trust_of(replace(stub_ensemble(StubMember("a"), weights=tmp_path, trust=True), digests={"a": {}}))
    assert trust.verdict is None
    assert "agreement" not in trust.scores  # a single voter
    assert {"volume_ml", "probability", "entropy", "weakest", "boundary", "soft_dice"} <= set(trust.scores)
    assert [reason.partition(":")[0] for reason in trust.missing] == ["a", "images", "expected Dice"]


def test_a_member_that_tells_no_features_is_named(ensemble_of: Callable[..., Ensemble]) -> None:
    trust = trust_of(ensemble_of(Seeing("a"), StubMember("b")))
    assert trust.missing == ("b: its runtime does not expose its features",)
    assert trust.verdict == "good"


def test_where_a_member_did_not_vote_no_dice_is_expected(ensemble_of: Callable[..., Ensemble]) -> None:
    ensemble = ensemble_of(Seeing("a"), StubMember("b", error=RuntimeError("no memory")))
    trust = trust_of(replace(ensemble, config=replace(ensemble.config, min_members=1)))
    assert (trust.expected_dice, trust.verdict) == (None, "good")
    assert "expected Dice: its calibration needs the votes of b, too" in trust.missing


@pytest.mark.parametrize(
    ("slopes", "reason"),
    [
        ({}, "it was not calibrated for these weights"),
        ({"agreement": 1.0, "spectral": -1.0}, "these scores are missing: spectral"),
    ],
)
def test_why_no_dice_is_expected_is_said(
    slopes: dict[str, float], reason: str, ensemble_of: Callable[..., Ensemble], tmp_path: Path
) -> None:
    ensemble = ensemble_of(StubMember("a"), StubMember("b"))
    write_references(fit_references(usual(), DIGESTS), calibration(slopes=slopes).as_json(), tmp_path)
    trust = trust_of(ensemble)
    assert (trust.verdict, trust.expected_dice) == ("good", None)
    assert trust.missing[-1] == f"expected Dice: {reason}"


def test_a_row_of_the_summary_says_what_the_report_does(ensemble_of: Callable[..., Ensemble]) -> None:
    columns = json.loads((REPOSITORY / "docs" / "summary.schema.json").read_text(encoding="utf-8"))["properties"]
    trusts = [trust_of(ensemble_of(Seeing("a", level=level), Seeing("b", level=level))) for level in (1.5, 9.0)]
    reports = [
        *({"trust": trust.as_json()} for trust in (*trusts, replace(trusts[0], verdict=None))),
        {"trust": None},
        {},
    ]
    told = [trust_columns(report) for report in reports]
    assert [row["trust"] for row in told] == ["good", "good", "unknown", "off", "off"]
    assert {row["trust"] for row in told} <= set(columns["trust"]["enum"])
    ends = [told[0][f"expected_dice{end}"] for end in ("_low", "", "_high")]
    assert ends == pytest.approx([trusts[0].interval[0], trusts[0].expected_dice, 1.0], abs=1e-4)  # type: ignore[index]
    assert [told[1][f"expected_dice{end}"] for end in ("_low", "", "_high")] == [None] * 3  # an empty mask
    assert told[0]["trust_why"] == "images and mask look as usual"


def test_report_page_and_recipe_hold_it(ensemble_of: Callable[..., Ensemble], tmp_path: Path) -> None:
    ensemble = ensemble_of(Seeing("a"), Seeing("b", level=2.24))
    raw = phantom_case()
    case = SegmentedCase.of(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble, ExtraOutputs())
    assert not list(faults(case.report, REPORT))
    told = case.report["trust"]
    assert told["verdict"] in ("check", "poor")
    assert told["scores"]["agreement"] == pytest.approx(case.report["agreement"], abs=1e-4)
    assert case.trust is not None
    page = render_case_page(case.report, case.result, None, case.trust)
    assert page.index("Expected Dice") < page.index("<h2>Lesions")
    assert "the members disagree" in page
    assert f"{case.trust.headline} {case.trust.reasons}" in closing_lines(case, ExtraOutputs(), Path("out"), ".mha")
    made_of = describe_recipe((), {}, ensemble.config, ExtraOutputs())
    assert made_of["options"]["trust_files"]["calibration.json"] == file_sha256(tmp_path / FOLDER / "calibration.json")
    assert (
        "trust_files" not in describe_recipe((), {}, replace(ensemble.config, trust=False), ExtraOutputs())["options"]
    )


def test_good_is_not_called_right(ensemble_of: Callable[..., Ensemble]) -> None:
    """Neither by words nor by the colour of what is done: a mask and an empty one can be usual and wrong."""
    for level, unseen in ((1.5, "tumour"), (9.0, "all members miss")):
        ensemble, raw = ensemble_of(Seeing("a", level=level), Seeing("b", level=level)), phantom_case()
        case = SegmentedCase.of(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble, ExtraOutputs())
        assert case.trust is not None
        assert (case.trust.verdict, case.trust.doubtful) == ("good", False)
        for told in (
            render_case_page(case.report, case.result, None, case.trust),
            closing_lines(case, ExtraOutputs(), Path("out"), ""),
        ):
            assert "does not mean right" in told
            assert unseen in told
    style = (REPOSITORY / "ensemble/outputs/report/templates/style.css").read_text(encoding="utf-8")
    assert ".good" not in style


def test_a_usual_mask_of_which_a_low_dice_is_expected_is_called_doubtful(
    ensemble_of: Callable[..., Ensemble], tmp_path: Path
) -> None:
    ensemble, raw = ensemble_of(Seeing("a"), Seeing("b")), phantom_case()
    low = calibration(intercept=-5.0, dice=UsualRange(0.0, 2.0))
    write_references(fit_references(usual(), DIGESTS), low.as_json(), tmp_path)
    case = SegmentedCase.of(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble, ExtraOutputs())
    told = case.report["trust"]
    assert told["verdict"] == "good"
    assert told["expected_dice"] < 0.5
    assert "low Dice" in told["why"][0]
    assert '<b class="other">A doubtful mask' in render_case_page(case.report, case.result, None, case.trust)


def test_a_reference_that_cannot_be_read_stops_no_batch(
    ensemble_of: Callable[..., Ensemble], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = ensemble_of(Seeing("a"), Seeing("b"))

    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ensemble.trust.reference.file_sha256", unreadable)
    made_of = describe_recipe((), {}, ensemble.config, ExtraOutputs())
    assert set(made_of["options"]["trust_files"].values()) == {""}


def test_what_nobody_asked_for_is_not_there(stub_ensemble: Callable[..., Ensemble]) -> None:
    ensemble, raw = stub_ensemble(StubMember("a")), phantom_case()
    case = SegmentedCase.of(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble, ExtraOutputs())
    assert case.report["trust"] is None
    assert "trust" not in case.report["seconds"]
    assert not InferenceSettings.of(RunConfig(), "cpu").features
    assert InferenceSettings.of(RunConfig(trust=True), "cpu").features


@pytest.mark.parametrize(
    ("words", "report", "expected"),
    [([], True, True), ([], False, False), (["--trust", "off"], True, False), (["--trust", "on"], False, True)],
)
def test_it_is_on_where_a_report_is_written(words: list[str], report: bool, expected: bool) -> None:
    assert make_run_config(parse_options(words, {}), report=report).trust is expected


def test_references_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = fit_references(usual(), DIGESTS)
    write_references(made, None, tmp_path)
    read = read_references(tmp_path, DIGESTS)
    assert not read.missing
    for evidence in usual(5, seed=1):
        assert compute_trust_scores(evidence, read) == pytest.approx(compute_trust_scores(evidence, made), rel=1e-4)
    assert all(path.stat().st_size < 2_000_000 for path in (tmp_path / FOLDER).iterdir())


def test_a_further_usual_case_lies_about_as_far_as_usual() -> None:
    references = fit_references(usual(60), DIGESTS)
    scores = [compute_trust_scores(evidence, references) for evidence in usual(60, seed=2)]
    most = {"spectral": 1.4, "spectral_lesion": 1.4, "rest": 1.4, "histogram": 2.0, "quality": 1.4, "mimicry": 1.6}
    for name in most:
        assert 0.7 < np.median([score[name] for score in scores]) < most[name]


def test_the_users_own_cases_become_usual(ensemble_of: Callable[..., Ensemble], tmp_path: Path) -> None:
    """Those of another scanner, all of them far from the first references."""
    shifted = [
        replace(evidence, whole={name: x + 50 for name, x in evidence.whole.items()}) for evidence in usual(40, seed=3)
    ]
    ensemble = ensemble_of(Seeing("a", off=50.0), Seeing("b", off=50.0))
    assert trust_of(ensemble).verdict == "poor"
    references, known = fit_user_reference(shifted, ensemble, "mine")
    assert known.slopes == {"agreement": 1.0}  # what was learnt of the Dice stays
    assert known.about["looks_of"] == "40 cases of mine"
    write_references(references, known.as_json(), tmp_path)
    assert trust_of(ensemble).verdict == "good"


def test_few_of_further_usual_cases_look_unusual() -> None:
    limits = atypicality_limits(out_of_fold_atypicality(usual(100), DIGESTS))
    assert set(limits) == set(ATYPICALITY_SCORES)
    references = fit_references(usual(100), DIGESTS)
    far = [atypicality(compute_trust_scores(evidence, references)) for evidence in usual(200, seed=4)]
    assert np.mean([any(limits[name].verdict(x) != "good" for name, x in case.items()) for case in far]) <= 0.05


@pytest.mark.parametrize("n", [50, 400])
def test_limits_and_intervals_hold_what_conformal_prediction_promises(n: int) -> None:
    draw = np.random.default_rng(0)
    beyond, inside = [], []
    for _ in range(200):
        values, further = draw.exponential(size=n), draw.exponential(size=50)
        beyond.append(np.mean(further > UsualRange.of(list(values), 0.025).limit))
        inside.append(np.mean(further <= conformal_quantile(values, 0.9)))
    assert np.mean(beyond) <= 0.026
    assert 0.9 <= np.mean(inside) <= 0.93


def test_verdicts_by_distance_from_the_usual() -> None:
    limit = UsualRange(median=1.0, limit=3.0)
    assert [limit.verdict(x) for x in (-5, 3.0, 3.1, 5.0, 5.1)] == ["good", "good", "check", "check", "poor"]
    assert expit(0) == 0.5
    assert atypicality({"agreement": 0.1}) == {}


def test_what_a_mask_says_of_itself() -> None:
    probability = np.zeros((6, 6, 6), np.float32)
    probability[1:4, 1:4, 1:4] = 0.9
    probability[5, 5, 5] = 0.6
    mask = probability > 0.5
    told = measure_mask(mask, probability)
    assert told["weakest"] == pytest.approx(0.6)
    assert told["boundary"] == pytest.approx(27 / 28)  # one voxel has six neighbours
    assert told["soft_dice"] == pytest.approx(2 * (27 * 0.9 + 0.6) / (27 * 0.9 + 0.6 + 28))
    assert measure_mask(np.zeros_like(mask), probability) == {}
    with_doubt: AnyArray = np.where(mask, 0.51, 0.0).astype(np.float32)
    assert measure_mask(mask, with_doubt)["entropy"] == pytest.approx(1.0, abs=0.01)


def test_a_judge_without_calibration_gives_no_verdict() -> None:
    references = fit_references(usual(), DIGESTS)
    told = TrustModel(references, None).verdict({"agreement": 0.1}, empty=False)
    assert (told.verdict, told.headline) == (None, "How far this mask can be trusted is not known.")


def test_what_another_release_made_is_not_used_and_the_last_lines_say_what_to_do(
    ensemble_of: Callable[..., Ensemble],
) -> None:
    ensemble = ensemble_of(Seeing("a"), Seeing("b"))
    for path in (ensemble.config.weights_folder / FOLDER).glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}), encoding="utf-8")
    told = trust_of(ensemble)
    assert told.verdict is None
    for what in ("reference", "calibration"):
        assert f"the {what} was made by another release (version 1; here: 2)" in told.text
    assert "make it again with members fit-reference" in told.text


def test_shipped_references_are_of_the_shipped_weights() -> None:
    """New weights need `python -m training.trust`: without it, every report would say that nothing is known of them."""
    digests = {spec.name: dict(spec.sha256) for spec in find_members(SHIPPED_WEIGHTS)}
    references = read_references(SHIPPED_WEIGHTS, digests)
    assert references.missing == ()
    told = Calibration.from_json(json.loads((SHIPPED_WEIGHTS / FOLDER / CALIBRATION).read_text(encoding="utf-8")))
    assert {name: dict(files) for name, files in told.weights.items()} == digests
    assert all(path.stat().st_size < 2_000_000 for path in (SHIPPED_WEIGHTS / FOLDER).iterdir())


def test_a_dataset_of_ones_own_becomes_usual_by_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub_ensemble: Callable[..., Ensemble]
) -> None:
    for number in range(22):
        for modality, array in phantom_arrays().items():
            write_image(array * (1 + 0.01 * number), tmp_path / "data" / f"case{number:02d}" / f"{modality}.nii.gz")
    (tmp_path / "data" / "case21" / "adc.nii.gz").unlink()  # is left out
    ensemble = replace(stub_ensemble(Seeing("a"), StubMember("s"), weights=tmp_path, trust=True), digests=DIGESTS)
    monkeypatch.setattr("ensemble.batch.reference.load_from_config", lambda config: replace(ensemble, config=config))
    fit_reference(tmp_path / "data", RunConfig(weights=tmp_path))
    read = read_references(tmp_path, DIGESTS)
    assert set(read.members) == {"a"}
    assert read.members["a"].whole.spectrum.n == 21
    told = json.loads((tmp_path / FOLDER / CALIBRATION).read_text(encoding="utf-8"))
    assert (told["slopes"], told["about"]["looks_of"]) == ({}, "21 cases of data")
    with pytest.raises(InputRefused, match="too few cases"):
        shutil.rmtree(tmp_path / "data" / "case00")
        shutil.rmtree(tmp_path / "data" / "case01")
        fit_reference(tmp_path / "data", RunConfig(weights=tmp_path))
