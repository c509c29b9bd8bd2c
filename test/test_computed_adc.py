"""An ADC that nobody gave, computed of b0 and DWI where one file or series holds both; and said so, or refused with both ways out."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from batch_runs import run_batch, write_weights
from conftest import GRID, StubMember, phantom_arrays, phantom_lesion, shared, write_image
from dicom_files import write_series
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.pipeline import Ensemble
from ensemble.prepare.adc import compute_missing_adc
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

ARRAYS = phantom_arrays()
HEAD = ARRAYS[Modality.DWI] > 0
ADC = ARRAYS[Modality.ADC]
#: Signal without weighting, such that S0 exp(-b D) is the phantom's DWI.
S0 = np.where(HEAD, ARRAYS[Modality.DWI] * np.exp(ADC * 1e-3), 0)


def signal(b: float, factor: float = 1.0) -> AnyArray:
    """What a scanner shows at a b-value, of a direction that diffuses `factor` times as fast as the mean."""
    return np.where(HEAD, S0 * np.exp(-b * factor * ADC * 1e-6), 0).astype(np.float32)


def four_d(path: Path, b_values: Sequence[float], *, factors: Sequence[float] = (), bval: bool = True) -> Path:
    """A 4-D NIfTI file of these b-values, with its .bval."""
    volumes = [signal(b, factor) for b, factor in zip(b_values, factors or [1.0] * len(b_values), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.JoinSeries([sitk.ReadImage(str(write_image(v, path.parent / ".one.mha"))) for v in volumes])
    (path.parent / ".one.mha").unlink()
    sitk.WriteImage(image, str(path))
    if bval:
        path.with_name(path.name.split(".")[0] + ".bval").write_text(" ".join(f"{b:g}" for b in b_values))
    return path


def computed(dwi: Path) -> tuple[AnyArray, tuple[str, ...]]:
    image = compute_missing_adc(read_case_files("x", {Modality.DWI: dwi})).images[Modality.ADC]
    return image.volume.array, image.notes


@pytest.mark.parametrize(
    ("b_values", "factors"),
    [
        ((0, 1000), ()),
        ((1000, 0), ()),
        ((0, 0, 1000), ()),
        ((50, 1000), ()),
        ((0, 800), ()),
        ((0, 1000, 1000, 1000), (1, 0.8, 1.0, 1.2)),
        ((0, 1000, 2000), ()),
        ((5, 995, 1005), ()),
    ],
)
def test_the_adc_of_a_phantom_is_exact(tmp_path: Path, b_values: Sequence[float], factors: Sequence[float]) -> None:
    array, (note,) = computed(four_d(tmp_path / "dwi.nii.gz", b_values, factors=factors))
    assert np.abs(array - ADC)[HEAD].max() < 0.01
    assert not array[~HEAD].any()
    assert note.startswith("ADC: computed")
    assert f"b = {min(b_values):g}" in note


def test_the_adc_of_a_dicom_series_is_exact(tmp_path: Path) -> None:
    """Up to the rounding of its pixels to whole numbers."""
    for number, b in enumerate((0, 1000)):
        write_series(Volume(signal(b) * 4, GRID), tmp_path, description="dwi", uid="1", first=1 + 100 * number, b=b)
    array, (note,) = computed(tmp_path)
    assert np.abs(array - ADC)[HEAD].max() < 5
    assert not array[~HEAD].any()
    assert "b = 0" in note


def test_noise_in_the_air_has_no_adc(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    volumes = []
    for b in (0, 1000):
        real, imaginary = draw.normal(0, 12, (2, *GRID.shape_zyx))
        volumes.append(np.hypot(signal(b) + real, imaginary).astype(np.float32))
    image = sitk.JoinSeries([sitk.ReadImage(str(write_image(v, tmp_path / "one.mha"))) for v in volumes])
    sitk.WriteImage(image, str(tmp_path / "dwi.nii.gz"))
    (tmp_path / "dwi.bval").write_text("0 1000")
    array, _ = computed(tmp_path / "dwi.nii.gz")
    assert (array[~HEAD] > 0).mean() < 0.02
    inside = array[HEAD & ~phantom_lesion()]
    assert abs(np.median(inside) - 800) < 15
    assert (inside > 0).all()


def test_what_is_no_number_stays_none(tmp_path: Path) -> None:
    path = four_d(tmp_path / "dwi.nii.gz", (0, 1000))
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    image[0, 12, 24, 20] = np.nan
    whole = sitk.GetImageFromArray(image, isVector=False)
    whole.CopyInformation(sitk.ReadImage(str(path)))
    sitk.WriteImage(whole, str(path))
    array, _ = computed(path)
    assert np.isnan(array[12, 24, 20])


@pytest.mark.parametrize(
    ("b_values", "bval", "why"),
    [
        ((1000,), True, "one volume"),
        ((0, 1000), False, "b-values"),
        ((1000, 1000), True, "no volume of b = 0"),
        ((300, 1000), True, "b = 300"),
    ],
)
def test_where_no_adc_can_be_computed_both_ways_are_named(
    tmp_path: Path, b_values: Sequence[float], bval: bool, why: str
) -> None:
    path = four_d(tmp_path / "dwi.nii.gz", b_values, bval=bval)
    with pytest.raises(InputRefused, match="there is no ADC image") as refusal:
        read_case_files("x", {Modality.DWI: path})
    assert why in refusal.value.found
    assert "--adc" in refusal.value.do
    assert ".bval" in refusal.value.do


def test_an_adc_that_is_given_is_the_one_that_is_used(tmp_path: Path) -> None:
    dwi = four_d(tmp_path / "dwi.nii.gz", (0, 1000))
    adc = write_image((ADC * 1.25).astype(np.float32), tmp_path / "adc.nii.gz")
    raw = read_case_files("x", {Modality.DWI: dwi, Modality.ADC: adc})
    case = prepare_raw(raw)
    assert compute_missing_adc(raw) is raw
    assert np.array_equal(case.images[Modality.ADC].array, (ADC * 1.25).astype(np.float32))
    assert not any("computed" in note for note in case.repairs)


def test_the_lesion_is_the_same_by_either_adc(tmp_path: Path) -> None:
    dwi = four_d(tmp_path / "dwi.nii.gz", (0, 1000))
    adc = write_image(ADC, tmp_path / "adc.nii.gz")
    given = prepare_raw(read_case_files("x", {Modality.DWI: dwi, Modality.ADC: adc}))
    made = prepare_raw(read_case_files("x", {Modality.DWI: dwi}))
    assert np.array_equal(given.brain.array, made.brain.array)
    for modality in (Modality.DWI, Modality.ADC):
        assert np.abs(given.tissue_normalized[modality].array - made.tissue_normalized[modality].array).max() < 1e-3
    assert any(note.startswith("ADC: computed") for note in made.repairs)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MemberSpec("a", "nnunet", Path("/nowhere"))
    monkeypatch.setattr(
        "ensemble.pipeline.load_from_config",
        lambda config: Ensemble(RunConfig(), InferenceSettings(), (spec,), (StubMember("a"),), 0.0),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("stubbed")
def test_run_computes_it_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dwi = four_d(tmp_path / "dwi.nii.gz", (0, 1000))
    assert main(["run", "--dwi", str(dwi), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "ADC: computed" in capfd.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(note.startswith("ADC: computed") for note in report["repairs"])
    assert report["case"]["files"]["adc"].startswith("computed from")
    assert "ADC: computed" in (tmp_path / "out" / "report.html").read_text()
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "mask.nii.gz")))
    assert mask.sum() > 0.9 * phantom_lesion().sum()


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_the_contract_computes_it_where_there_is_no_adc(tmp_path: Path, folder: str) -> None:
    images = tmp_path / "in" / "images"
    four_d(images / "dwi-brain-mri" / "case.nii.gz", (0, 1000))
    if folder == "empty":
        (images / "adc-brain-mri").mkdir()
    assert (
        main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu", "--report"]) == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(note.startswith("ADC: computed") for note in report["repairs"])


@pytest.mark.usefixtures("stubbed")
def test_an_adc_that_the_contract_lists_must_be_there(tmp_path: Path) -> None:
    images = tmp_path / "in" / "images"
    four_d(images / "dwi-brain-mri" / "case.nii.gz", (0, 1000))
    socket = {"slug": "adc-brain-mri", "relative_path": "images/adc-brain-mri"}
    (tmp_path / "in" / "inputs.json").write_text(json.dumps([{"socket": socket}]))
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("worklist", [False, True])
def test_batch_computes_it_and_refuses_only_where_it_can_not(tmp_path: Path, worklist: bool) -> None:
    four_d(tmp_path / "set" / "both" / "dwi.nii.gz", (0, 1000))
    write_image(ARRAYS[Modality.DWI], tmp_path / "set" / "alone" / "dwi.nii.gz")
    given = tmp_path / "set"
    if worklist:
        given = tmp_path / "list.csv"
        given.write_text("case,dwi\nboth,set/both/dwi.nii.gz\nalone,set/alone/dwi.nii.gz\n")
    assert run_batch(given, tmp_path / "out", write_weights(tmp_path / "weights"), report=True) == 3
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert rows["both"]["status"] == "done"
    assert "ADC: computed" in str(rows["both"])
    assert rows["alone"]["status"] == "failed"
    assert "it can't be computed" in str(rows["alone"])


@pytest.mark.slow
def test_a_bval_that_comes_later_makes_the_result_anew(tmp_path: Path) -> None:
    dwi = four_d(tmp_path / "set" / "case" / "dwi.nii.gz", (0, 1000))
    weights = write_weights(tmp_path / "weights")
    assert run_batch(tmp_path / "set", tmp_path / "out", weights) == 0
    dwi.with_name("dwi.bval").write_text("0 900")
    assert run_batch(tmp_path / "set", tmp_path / "out", weights) == 0
    (report,) = (tmp_path / "out").rglob("report.json")
    assert "b = 900" in report.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["uih_a", "philips_a", "siemens_supine_b", "canon_b1500"])
def test_the_published_adc_of_real_heads_is_met_in_tissue(tmp_path: Path, head: str) -> None:
    folder = shared(f"normals/{head}")
    b0, dwi, theirs = (
        sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("b0", "dwi", "adc")
    )
    dwi.CopyInformation(b0)
    sitk.WriteImage(sitk.JoinSeries([b0, dwi]), str(tmp_path / "dwi.nii.gz"))
    (tmp_path / "dwi.bval").write_text(f"0 {json.loads((folder / 'info.json').read_text())['b']}")
    own, _ = computed(tmp_path / "dwi.nii.gz")
    published = sitk.GetArrayFromImage(theirs)
    signal = sitk.GetArrayFromImage(b0)
    tissue = (published > 500) & (published < 1200) & (signal > 0.3 * np.percentile(signal, 95))
    assert tissue.sum() > 1000
    ratio = own[tissue] / published[tissue]
    assert abs(np.median(ratio) - 1) < 0.02
    assert (np.abs(ratio - 1) < 0.05).mean() > 0.95
