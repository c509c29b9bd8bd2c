"""What each stage of an encoder makes of regions, and `members diagnose`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batch_runs import write_dataset
from conftest import StubMember, phantom_case, phantom_lesion
from ensemble.batch.diagnose import diagnose_dataset, diagnose_simulated
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, UsageError, WeightsBroken
from ensemble.evaluate.plots import as_png
from ensemble.families.base import EncodingMember, InferenceSettings
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.geometry import Grid
from ensemble.metrics import lesion_components
from ensemble.pipeline import Ensemble
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.spectral.diagnosis import as_json, diagnose, format_table
from ensemble.spectral.embeddings import (
    CaseEmbeddings,
    EmbeddedRegion,
    RegionKind,
    embed,
    open_encoders,
    select_regions,
)
from ensemble.spectral.plots import draw_diagnosis
from ensemble.types import FloatArray, Modality, ignore_progress
from ensemble.volume import Volume
from nnunet_folders import FolderSpec, build_folder, small_case

SETTINGS = InferenceSettings(session="torch", tta="none", features=True)


def member_of(folder: Path, orientation: str = "native") -> NnunetV2Member:
    entry = {"name": "m", "kind": "nnunet", "orientation": orientation}
    return NnunetV2Member.load(MemberSpec.from_json(entry, folder), SETTINGS)


@pytest.mark.parametrize(
    "spec",
    [
        FolderSpec(),
        FolderSpec(
            configuration="2d", patch=(24, 24), spacing_mm=(2.0, 2.0), strides=((1, 1), (2, 2)), mirror_axes=(0, 1)
        ),
    ],
    ids=["3d", "2d"],
)
def test_the_last_stage_of_the_whole_brain_is_what_the_trust_score_sees(spec: FolderSpec, tmp_path: Path) -> None:
    """Two ways to the same mean, where one window holds all."""
    case, member = small_case((14, 22, 20)), member_of(build_folder(tmp_path, spec))
    stages = member.encode(case, case.brain.array[None].astype(np.float32))
    features = member.predict(case, SETTINGS, ignore_progress).features
    assert features is not None
    assert len(stages) == 2
    assert stages[0].shape == (1, 6)
    np.testing.assert_allclose(stages[-1][0], features.whole, rtol=1e-4, atol=1e-5)


def test_a_region_is_where_it_lies_however_the_image_is_stored(tmp_path: Path) -> None:
    member = member_of(build_folder(tmp_path), "canonical")
    case, regions = small_case((14, 22, 20)), np.zeros((2, 14, 22, 20), np.float32)
    regions[0, 2:7, 3:9, 4:8] = 1
    regions[1, 5:12, 12:20, 10:18] = 1
    grid = case.grid
    turned = Grid(grid.size, grid.spacing_mm, grid.origin_mm, (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    images = {m: Volume(np.ascontiguousarray(v.array[..., ::-1]), turned) for m, v in case.images.items()}
    brain = Volume(np.ascontiguousarray(case.brain.array[..., ::-1]), turned)
    stored = replace(case, images=images, as_read=images, tissue_normalized=images, brain=brain)
    for one, other in zip(member.encode(case, regions), member.encode(stored, regions[..., ::-1]), strict=True):
        assert np.isfinite(one).all()
        assert not np.allclose(one[0], one[1])
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_member_that_was_not_opened_for_it_says_so(tmp_path: Path) -> None:
    folder = build_folder(tmp_path)
    spec = MemberSpec.from_json({"name": "m", "kind": "nnunet"}, folder)
    with pytest.raises(TypeError, match="opened for its features"):
        NnunetV2Member.load(spec, replace(SETTINGS, features=False)).encode(
            small_case(), np.zeros((1, 22, 40, 36), np.float32)
        )


def test_members_without_an_encoder_to_ask_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble.spectral.embeddings.open_member", lambda spec, settings: StubMember(spec.name))
    with pytest.raises(WeightsBroken, match="no member exposes"):
        open_encoders([MemberSpec("seals", "nnunet_v1", Path())], "cpu")


def test_regions_are_the_brain_each_lesion_and_places_without_one() -> None:
    case, lesion = prepare_raw(phantom_case()), phantom_lesion() > 0
    regions = select_regions(case, lesion)
    assert regions == select_regions(case, lesion)
    kinds = [region.kind for region in regions]
    assert kinds[0] is RegionKind.BRAIN
    assert kinds.count(RegionKind.LESION) == lesion_components(lesion)[1]
    assert regions[1].ml == pytest.approx(lesion.sum() * case.grid.voxel_ml)
    assert lesion[regions[1].centre_zyx]
    assert all(not lesion[region.centre_zyx] for region in regions if region.kind is RegionKind.WITHOUT_LESION)
    assert {region.kind for region in select_regions(case, lesion & False)} <= {
        RegionKind.BRAIN,
        RegionKind.WITHOUT_LESION,
    }


def cases(number: int = 14) -> list[CaseEmbeddings]:
    """Two members, one of which lacks the first case; lesions are off along the first features, large ones more."""
    draw, found = np.random.default_rng(0), []
    for at in range(number):
        regions = [
            EmbeddedRegion(RegionKind.BRAIN, 1200.0),
            EmbeddedRegion(RegionKind.LESION, 0.5),
            EmbeddedRegion(RegionKind.LESION, 5.0),
            *[EmbeddedRegion(RegionKind.WITHOUT_LESION, 0.0)] * 3,
        ]
        stages = []
        for size in (6, 9):
            features = draw.standard_normal((len(regions), size)) * np.arange(1, size + 1) ** -0.7
            features[1:3, :2] += [[1.0, 0], [2.0, 1.0]]
            stages.append(features.astype(np.float32))
        members = {"a": tuple(stages)} | ({"b": tuple(stages[:1])} if at else {})
        found.append(CaseEmbeddings(f"case{at}", tuple(regions), members))
    return found


def test_embeddings_are_read_as_they_were_written(tmp_path: Path) -> None:
    (case, *_) = cases(1)
    case.save(tmp_path / "case0.npz")
    read = CaseEmbeddings.read(tmp_path / "case0.npz")
    assert (read.name, read.regions) == (case.name, case.regions)
    for stage, other in zip(read.stages["a"], case.stages["a"], strict=True):
        np.testing.assert_array_equal(stage, other)


def test_a_diagnosis_says_of_each_stage_what_is_known() -> None:
    stages = diagnose(cases(), draws=3)
    assert [(stage.member, stage.stage, stage.brain.dimensions) for stage in stages] == [
        ("a", 1, 6),
        ("a", 2, 9),
        ("b", 1, 6),
    ]
    first = stages[0]
    assert first.brain.recovery.n == 13
    assert first.presence is not None
    assert first.presence.measured > 0.7
    assert first.size is not None
    told = json.loads(json.dumps(as_json(stages), allow_nan=False))
    assert told[0]["lesion_or_none"]["windows"] == [28, 42]
    assert told[0]["whole_brain"]["by_size"][0]["n"] == 3
    assert format_table(stages).count("| a | 1 |") == 4
    assert diagnose(cases(9)) == []


class Encoding(StubMember):
    """A stub that has an encoder."""

    def encode(self, case: PreparedCase, regions: FloatArray) -> tuple[FloatArray, ...]:
        draw = np.random.default_rng(list(case.name.encode()))
        return tuple(draw.standard_normal((len(regions), size)).astype(np.float32) for size in (4, 5))


@pytest.mark.slow
def test_a_dataset_is_diagnosed_and_a_case_that_is_refused_left_out(
    stub_ensemble: Callable[..., Ensemble], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Encoding("a")
    assert isinstance(member, EncodingMember)
    monkeypatch.setattr("ensemble.batch.diagnose.load_from_config", lambda config: stub_ensemble(member))
    monkeypatch.setattr("ensemble.batch.diagnose.open_encoders", lambda specs, device: [member])
    monkeypatch.setattr("ensemble.batch.diagnose.diagnose", lambda cases: diagnose(cases, draws=2))
    dataset = write_dataset(tmp_path / "data", 10)
    diagnose_dataset(dataset, tmp_path / "out", RunConfig())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "diagnosis.json", "diagnosis.md"]
    told = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert [stage["dimensions"] for stage in told] == [4, 5]
    assert told[0]["whole_brain"]["n"] == 11


def test_an_encoder_to_which_all_cases_are_alike_knows_nothing() -> None:
    alike = [replace(case, stages={"a": (np.ones((6, 4), np.float32),)}) for case in cases()]
    (stage,) = diagnose(alike, draws=2)
    assert (stage.brain.recovery.modes, stage.brain.recovery.gap, stage.brain.law) == (0, 0, None)
    assert stage.presence is not None
    assert stage.presence.measured == 0.5
    assert as_png(draw_diagnosis([stage]))
    json.dumps(as_json([stage]), allow_nan=False)


def test_too_few_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="too few cases"):
        diagnose_dataset(write_dataset(tmp_path / "data", 2), tmp_path / "out", RunConfig())
    with pytest.raises(UsageError, match="too few simulated patients"):
        diagnose_simulated(9, tmp_path / "out", RunConfig())


def test_without_the_simulator_simulated_patients_are_an_error_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match="needs the simulator") as refused:
        diagnose_simulated(20, tmp_path / "out", RunConfig())
    assert "--dataset" in str(refused.value.do)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["diagnose"],
        ["diagnose", "--dataset", "a", "--simulated", "20"],
        ["list", "--out", "a"],
        ["check", "--simulated", "20"],
        ["diagnose", "a", "--dataset", "a"],
    ],
)
def test_words_that_do_not_go_together_are_refused(words: list[str]) -> None:
    assert main(["members", *words]) == UsageError.exit_code


@pytest.mark.parametrize(("words", "found"), [([], "neither"), (["--dataset", "a", "--simulated", "20"], "both")])
def test_a_diagnosis_says_which_of_its_two_sources_it_was_given(
    words: list[str], found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["members", "diagnose", *words])
    assert f"exactly one of --dataset and --simulated found: {found} do:" in capfd.readouterr().err


def test_what_an_encoder_lacks_an_image_for_it_is_not_asked() -> None:
    case = prepare_raw(phantom_case())
    able, unable = Encoding("a"), Encoding("b", needs=(Modality.FLAIR,))
    found = embed(case, [EmbeddedRegion(RegionKind.BRAIN, 0.0)], [able, unable])
    assert list(found.stages) == ["a"]


def test_torch_computes_no_stage_beyond_the_last() -> None:
    """The decoder of a network is never asked."""
    from ensemble.inference.session_torch import TorchSession

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Module()
            self.encoder.stages = torch.nn.ModuleList([torch.nn.Conv3d(1, 2, 1), torch.nn.Conv3d(2, 3, 1)])

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            for stage in self.encoder.stages:
                windows = stage(windows)
            raise AssertionError("the decoder was asked")

    session = TorchSession(Network(), dims=3, device="cpu", tap="encoder.stages.1")
    assert [maps.shape[1] for maps in session.encoded(torch.zeros(1, 1, 4, 4, 4))] == [2, 3]
