"""Who votes, who does not, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from conftest import GRID, REPOSITORY, StubMember, phantom_case, phantom_lesion
from ensemble import pipeline
from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import InputRefused, MembersFailed, UsageError
from ensemble.families.base import MemberPrediction
from ensemble.metrics import dice
from ensemble.outputs.report.run_report import build_report
from ensemble.pipeline import Ensemble, load_from_config, segment_raw
from ensemble.prepare import flair
from ensemble.prepare.registration import RegistrationResult
from ensemble.progress import SilentWatcher
from ensemble.types import Modality
from ensemble.volume import Volume
from json_schema import faults

Build = Callable[..., Ensemble]
REPORT = json.loads((REPOSITORY / "docs" / "report.schema.json").read_text(encoding="utf-8"))
BOOM = RuntimeError("CUDA out of memory")


def test_a_case_is_segmented(stub_ensemble: Build) -> None:
    result = segment_raw(phantom_case(), stub_ensemble(StubMember("a"), StubMember("b")), SilentWatcher())
    assert dice(phantom_lesion(), result.fused.mask.array) > 0.98
    assert result.fused.mask.grid == GRID
    assert result.lesion_count == 1
    assert result.lesion_ml == pytest.approx(phantom_lesion().sum() * GRID.voxel_ml, rel=0.03)
    assert [outcome.status for outcome in result.outcomes] == ["voted", "voted"]
    assert set(result.seconds) == {"prepare", "member a", "member b", "fuse"}


def test_a_healthy_case_gives_an_empty_mask(stub_ensemble: Build) -> None:
    result = segment_raw(phantom_case(), stub_ensemble(StubMember("a", level=9.0)), SilentWatcher())
    assert not result.fused.mask.array.any()
    assert (result.lesion_count, result.lesion_ml) == (0, 0.0)


def test_a_member_that_needs_flair_is_not_applicable_without(stub_ensemble: Build) -> None:
    ensemble = stub_ensemble(StubMember("a"), StubMember("f", needs=(Modality.FLAIR,)))
    outcomes = segment_raw(phantom_case(), ensemble, SilentWatcher()).outcomes
    assert [(o.status, o.reason) for o in outcomes] == [("voted", ""), ("not applicable", "needs FLAIR")]
    assert [o.status for o in segment_raw(phantom_case(flair=True), ensemble, SilentWatcher()).outcomes] == [
        "voted",
        "voted",
    ]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_member_that_raises_ends_the_run(stub_ensemble: Build, position: int) -> None:
    members = [StubMember(name) for name in "abc"]
    members[position] = StubMember("abc"[position], error=BOOM)
    with pytest.raises(MembersFailed, match="2 of 3 members voted; 3 are required") as failure:
        segment_raw(phantom_case(), stub_ensemble(*members), SilentWatcher())
    assert "RuntimeError: CUDA out of memory" in failure.value.found
    assert failure.value.exit_code == 5


def test_the_others_may_vote_when_the_user_says_so(stub_ensemble: Build) -> None:
    ensemble = stub_ensemble(StubMember("a"), StubMember("b", error=BOOM), min_members=1)
    result = segment_raw(phantom_case(), ensemble, SilentWatcher())
    assert result.fused.voters == ("a",)
    assert result.outcomes[1].status == "failed"
    assert result.outcomes[1].prediction is None
    assert dice(phantom_lesion(), result.fused.mask.array) > 0.98


@pytest.mark.parametrize(
    ("members", "min_members"),
    [
        ([StubMember("a", error=BOOM), StubMember("b", error=BOOM)], 1),
        ([StubMember("f", needs=(Modality.FLAIR,))], None),
        ([StubMember("f", needs=(Modality.FLAIR,)), StubMember("a", error=BOOM)], None),
        ([StubMember("f", needs=(Modality.FLAIR,)), StubMember("a")], 2),
    ],
    ids=["all failed", "none applicable", "the applicable one failed", "more wanted than applicable"],
)
def test_too_few_votes(stub_ensemble: Build, members: list[StubMember], min_members: int | None) -> None:
    with pytest.raises(MembersFailed):
        segment_raw(phantom_case(), stub_ensemble(*members, min_members=min_members), SilentWatcher())


def test_more_votes_than_there_are_members_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="members: 3"):
        load_from_config(RunConfig(min_members=5, device="cpu"))
    with pytest.raises(UsageError, match="members: 1"):
        load_from_config(RunConfig(min_members=2, members=("iso3d",), device="cpu"))


def test_a_refused_input_is_no_member_failure(stub_ensemble: Build) -> None:
    refusing = StubMember("a", error=InputRefused("too small for this member"))
    with pytest.raises(InputRefused, match=r"too small for this member(.|\n)*refused by member a"):
        segment_raw(phantom_case(), stub_ensemble(refusing, StubMember("b"), min_members=1), SilentWatcher())


def test_a_prediction_on_another_grid_is_a_failure(stub_ensemble: Build) -> None:
    class Elsewhere(StubMember):
        def predict(self, *arguments: object) -> MemberPrediction:  # type: ignore[override]
            there = replace(GRID, origin_mm=(0.0, 0.0, 0.0))
            return MemberPrediction(self.name, Volume(np.zeros(GRID.shape_zyx, np.float32), there), 1)

    with pytest.raises(MembersFailed, match="0 of 1"):
        segment_raw(phantom_case(), stub_ensemble(Elsewhere("a")), SilentWatcher())


def test_an_interrupt_is_no_member_failure(stub_ensemble: Build) -> None:
    with pytest.raises(KeyboardInterrupt):
        segment_raw(
            phantom_case(), stub_ensemble(StubMember("a", error=KeyboardInterrupt()), min_members=1), SilentWatcher()
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_what_is_no_probability_is_no_vote(stub_ensemble: Build, value: float) -> None:
    class Broken(StubMember):
        def predict(self, *arguments: object) -> MemberPrediction:  # type: ignore[override]
            array = np.zeros(GRID.shape_zyx, np.float32)
            array[3, 4, 5] = value
            return MemberPrediction(self.name, Volume(array, GRID), 1)

    with pytest.raises(MembersFailed, match="1 of 2") as failure:
        segment_raw(phantom_case(), stub_ensemble(StubMember("a"), Broken("b")), SilentWatcher())
    assert "outside 0 to 1" in failure.value.found


def test_a_majority_by_weights_is_on_record(stub_ensemble: Build) -> None:
    """The surer member's vote counts twice: alone it decides ties by its mean, and the report says so."""
    keen, shy = StubMember("keen", level=1.2), StubMember("shy", level=9.0)
    for weights, found in ((None, False), ({"keen": 2.0}, True), ({"shy": 2.0}, False)):
        ensemble = stub_ensemble(keen, shy, member_weights=weights)
        result = segment_raw(phantom_case(), ensemble, SilentWatcher())
        assert result.fused.mask.array.any() == found
        report = build_report(phantom_case(), result, ensemble)
        assert list(faults(report["fusion"], REPORT["properties"]["fusion"])) == []
        assert report["fusion"].get("weights") == (weights and {"keen": 1.0, "shy": 1.0} | weights)


def test_what_is_too_small_for_a_lesion_is_on_record(stub_ensemble: Build) -> None:
    ensemble = stub_ensemble(StubMember("a"), min_lesion_ml=500.0)
    result = segment_raw(phantom_case(), ensemble, SilentWatcher())
    assert not result.fused.mask.array.any()
    fusion = build_report(phantom_case(), result, ensemble)["fusion"]
    assert list(faults(fusion, REPORT["properties"]["fusion"])) == []
    assert (fusion["min_lesion_ml"], fusion["small_left_out"]) == (500.0, 1)


def test_flair_is_registered_only_for_who_needs_it(stub_ensemble: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def never(*_: object) -> RegistrationResult:
        asked.append(1)
        return RegistrationResult(None, "found no alignment")

    monkeypatch.setattr(flair, "register_rigidly", never)
    ensemble, raw = stub_ensemble(StubMember("a")), phantom_case(flair=True)
    shifted = replace(GRID, origin_mm=(GRID.origin_mm[0] + 1, *GRID.origin_mm[1:]))
    image = raw.images[Modality.FLAIR]
    raw = replace(
        raw, images={**raw.images, Modality.FLAIR: replace(image, volume=Volume(image.volume.array, shifted))}
    )
    for takes, shows in ((True, True), (True, False), (False, True), (False, False)):
        asked.clear()
        result = segment_raw(raw, replace(ensemble, takes_flair=takes), SilentWatcher(), shows_images=shows)
        assert bool(asked) == (takes or shows)
        (said,) = [repair for repair in result.case.repairs if "FLAIR resampled" in repair]
        assert ("not needed, since no member takes FLAIR" in said) == (not asked)
        assert result.case.images[Modality.FLAIR].grid == result.case.grid


@pytest.mark.parametrize(("members", "takes"), [(("iso3d",), False), (("flair3d",), True)])
def test_who_takes_flair_is_known(members: tuple[str, ...], takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_member", lambda spec, settings: StubMember(spec.name))
    assert load_from_config(RunConfig(weights=SHIPPED_WEIGHTS, members=members)).takes_flair == takes
    assert load_from_config(RunConfig(weights=SHIPPED_WEIGHTS, members=members, trust=True)).takes_flair
