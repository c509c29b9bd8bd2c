"""Headers of another scale, and networks that ask for lattices which no memory holds: refused before a network runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from conftest import GRID, phantom_arrays, phantom_case, write_image
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, UsageError, WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.geometry import Grid, Triple
from ensemble.members.manifest import find_members, open_member
from ensemble.members.pack import pack_members
from ensemble.options import make_run_config, parse_options
from ensemble.prepare import skull
from ensemble.prepare.case import prepare_raw
from ensemble.readers.base import RawCase
from ensemble.resample import NnunetResampling, resample_volume
from ensemble.types import Modality
from ensemble.volume import Volume
from nnunet_folders import FolderSpec, build_folder
from nnunet_v1_folders import V1Spec, build_v1_folder

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
ALL = (DWI, ADC, FLAIR)


def scaled(factors: tuple[float, float, float], *modalities: Modality) -> RawCase:
    """The phantom (1.2 l) with the voxels of some images so many times as large along x, y, z."""
    raw = phantom_case(flair=True)
    x, y, z = (mm * factor for mm, factor in zip(GRID.spacing_mm, factors, strict=True))
    images = {
        m: replace(image, volume=Volume(image.volume.array, replace(GRID, spacing_mm=(x, y, z))))
        for m, image in raw.images.items()
        if m in modalities
    }
    return replace(raw, images={**raw.images, **images})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr(skull, "_brain_probability", never)


@pytest.mark.parametrize("strip", ["auto", "always", "never"])
@pytest.mark.parametrize(
    "factors",
    [(f, f, f) for f in (0.1, 0.001, 1e-6, 10.0, 1000.0)]
    + [(1, 1, 0.02), (1, 1, 20.0), (0.1, 1, 1), (1, 10.0, 1), (1, 1, 200.0), (1e-30, 1, 1), (1e30, 1, 1)],
)
def test_a_header_of_another_scale_is_refused_before_any_network(
    factors: tuple[float, float, float], strip: str
) -> None:
    with pytest.raises(InputRefused) as refusal:
        prepare_raw(scaled(factors, *ALL), strip)  # type: ignore[arg-type]
    assert "mm" in refusal.value.found
    assert "units" in refusal.value.do
    assert "--brain-ml" in refusal.value.do


@pytest.mark.parametrize("factors", [(3, 3, 3), (2, 2, 2), (0.5, 0.5, 0.5), (1, 1, 4), (0.1, 1, 10), (4, 0.5, 0.5)])
def test_a_brain_that_is_none_is_refused(factors: tuple[float, float, float]) -> None:
    with pytest.raises(InputRefused, match="size") as refusal:
        prepare_raw(scaled(factors, *ALL), "never")
    assert "units" in refusal.value.do


@pytest.mark.parametrize("modality", [ADC, FLAIR])
@pytest.mark.parametrize(
    "factors", [(0.1, 0.1, 0.1), (10, 10, 10), (1000, 1000, 1000), (1, 1, 0.02), (1, 1, 100), (0.1, 1, 1)]
)
def test_adc_or_flair_of_another_scale_is_refused(modality: Modality, factors: tuple[float, float, float]) -> None:
    with pytest.raises(InputRefused, match=modality.value.upper()) as refusal:
        prepare_raw(scaled(factors, modality), "never")
    assert refusal.value.where == f"{modality}.mha"


@pytest.mark.parametrize("factor", [0.8, 1.2, 1.5, 2, 3])
def test_an_adc_with_the_dwis_matrix_and_another_voxel_size_is_refused(factor: float) -> None:
    for factors in ((factor, factor, factor), (1, 1, factor)):
        with pytest.raises(InputRefused, match="ADC"):
            prepare_raw(scaled(factors, ADC), "never")


@pytest.mark.parametrize("factors", [(1.5, 1.5, 1.5), (1, 1, 2.2), (1, 1, 5), (3, 1, 1)])
def test_an_extracted_flair_of_no_brains_size_is_refused(factors: tuple[float, float, float]) -> None:
    with pytest.raises(InputRefused, match="FLAIR"):
        prepare_raw(scaled(factors, FLAIR))


def test_hd_bets_brain_has_the_same_range(monkeypatch: pytest.MonkeyPatch) -> None:
    brain = phantom_arrays()[DWI] > 0
    monkeypatch.setattr(skull, "_brain_probability", lambda *_: brain)
    prepare_raw(phantom_case(), "always")
    with pytest.raises(InputRefused, match="did not find the brain"):
        prepare_raw(phantom_case(), "always", brain_ml=(300.0, 1000.0))
    monkeypatch.setattr(skull, "_brain_probability", lambda *_: brain & (np.arange(len(brain)) > 17)[:, None, None])
    with pytest.raises(InputRefused, match="did not find the brain"):
        prepare_raw(phantom_case(), "always")


def test_brain_ml_lets_infants_and_open_skulls_through() -> None:
    small, large = scaled((0.5, 0.5, 0.5), *ALL), scaled((2, 2, 2), *ALL)
    prepare_raw(small, "never", brain_ml=(20.0, 500.0))
    prepare_raw(large, "never", brain_ml=(300.0, 12000.0))


def test_a_skull_stripped_lattice_is_bounded_before_hd_bet() -> None:
    """Much air around a head is no reason to let a network take all memory."""
    raw = phantom_case()
    wide = replace(GRID, size=(220, 220, 150), spacing_mm=(4.0, 4.0, 5.0))
    images = {}
    for modality, image in raw.images.items():
        array = np.zeros(wide.shape_zyx, np.float32)
        array[:24, :48, :40] = image.volume.array
        images[modality] = replace(image, volume=Volume(array, wide))
    with pytest.raises(InputRefused, match="too large") as refusal:
        prepare_raw(replace(raw, images=images), "always")
    assert "--skull-strip never" in refusal.value.do


def test_every_option_place_takes_brain_ml() -> None:
    assert make_run_config(parse_options([], {})).brain_ml == (300.0, 2500.0)
    assert make_run_config(parse_options(["--brain-ml", "80,900"], {})).brain_ml == (80.0, 900.0)
    assert make_run_config(parse_options([], {"ISLES_BRAIN_ML": "80,900"})).brain_ml == (80.0, 900.0)
    for command in (["run", "--dwi", "d", "--adc", "a", "--out", "o"], ["batch", "D", "O"], ["serve"]):
        assert make_run_config(parse_options([*command, "--brain-ml", "80,900"], {})).brain_ml == (80.0, 900.0)


@pytest.mark.parametrize("text", ["80", "900,80", "a,b", "80,900,3", "-1,900", "nan,900", "300,inf", "5,5", ""])
def test_a_range_that_is_none_is_wrong_usage(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="brain-ml"):
        make_run_config(parse_options([f"--brain-ml={text}"], {}))
    if text:
        with pytest.raises(UsageError):
            make_run_config(parse_options([], {"ISLES_BRAIN_ML": text}))


@pytest.mark.parametrize(
    ("units", "factor", "code"), [("meter", 1.0, 3), ("micron", 1.0, 3), ("meter", 1e-3, 0), ("micron", 1e3, 0)]
)
def test_units_that_a_nifti_header_names_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: str, factor: float, code: int
) -> None:
    straight = replace(GRID, direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), origin_mm=(0.0, 0.0, 0.0))
    files = []
    for modality, array in phantom_arrays().items():
        path = write_image(array, tmp_path / f"{modality}.nii", straight)
        image = nibabel.load(path, mmap=False)
        affine = image.affine.copy()
        affine[:3] *= factor
        changed = nibabel.Nifti1Image(np.asarray(image.dataobj), affine)
        changed.header.set_xyzt_units(units)
        nibabel.save(changed, path)
        files.append(path)
    from ensemble.readers.imagefile import read_case_files

    raw = read_case_files("units", {DWI: files[0], ADC: files[1]})
    if code:
        with pytest.raises(InputRefused) as refusal:
            prepare_raw(raw)
        assert "units" in refusal.value.do
    else:
        prepare_raw(raw)


SMALL = FolderSpec(patch=(8, 16, 16), mirror_axes=(2,), strides=((1, 1, 1), (2, 2, 2)))

#: What plans may ask for that no memory holds.
TOO_MUCH: dict[str, Callable[[Path], Path]] = {
    "tiny spacing": lambda p: build_folder(p, replace(SMALL, spacing_mm=(0.05, 0.05, 0.05))),
    "spacing of a metre": lambda p: build_folder(p, replace(SMALL, spacing_mm=(1000.0, 2.0, 2.0))),
    "tiny spacing along one axis": lambda p: build_folder(p, replace(SMALL, spacing_mm=(2.0, 2.0, 1e-5))),
    "spacing of 1e-300": lambda p: build_folder(p, replace(SMALL, spacing_mm=(1e-300, 2.0, 2.0))),
    "tiny 2-D spacing": lambda p: build_folder(
        p, replace(SMALL, configuration="2d", patch=(16, 16), spacing_mm=(0.01, 0.01), strides=((1, 1), (2, 2)), mirror_axes=(1,))
    ),
    "huge patch": lambda p: build_folder(p, replace(SMALL, patch=(4096, 4096, 4096))),
    "long patch": lambda p: build_folder(p, replace(SMALL, patch=(16, 16, 65536))),
    "patch of 400": lambda p: build_folder(p, replace(SMALL, patch=(400, 400, 400), features=32)),
    "packed": lambda p: pack_with(p, lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[0.01] * 3)),
    "SEALS spacing": lambda p: build_v1_folder(p / "seals", V1Spec(spacing_mm=(0.02, 0.02, 0.02))),
    "SEALS patch": lambda p: build_v1_folder(p / "seals", V1Spec(patch=(1024, 1024, 1024))),
}  # fmt: skip


def pack_with(folder: Path, change: Callable[[dict], object]) -> Path:
    """A packed member whose plans were changed afterwards, its digests too."""
    from ensemble.files import file_sha256

    (packed,) = pack_members(build_folder(folder / "whole", SMALL), folder / "packed", "fp32")
    plans = json.loads((packed / "plans.json").read_text())
    change(plans)
    (packed / "plans.json").write_text(json.dumps(plans))
    member = json.loads((packed / "member.json").read_text())
    member["sha256"]["plans.json"] = file_sha256(packed / "plans.json")
    (packed / "member.json").write_text(json.dumps(member))
    return packed


@pytest.mark.parametrize("name", TOO_MUCH)
def test_members_check_calls_out_what_no_memory_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = TOO_MUCH[name](tmp_path)
    assert main(["members", "check", "--weights", str(folder)]) == 4
    said = capfd.readouterr().out
    (spec,) = find_members(folder)
    assert "broken" in said
    assert spec.name in said
    assert " mm" in said
    assert " x " in said
    assert "Traceback" not in said


def test_a_manifest_that_asks_for_what_no_memory_holds_is_called_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = build_folder(tmp_path, SMALL)
    entry = {"name": "mine", "kind": "nnunet", "folder": folder.name, "spacing_mm": [0.01, 0.01, 0.01]}
    (tmp_path / "manifest.json").write_text(json.dumps({"members": [entry]}))
    assert main(["members", "check", "--weights", str(tmp_path)]) == 4
    assert "member mine" in capfd.readouterr().out


def test_usual_members_are_not_called_out(tmp_path: Path) -> None:
    """Sub-millimetre networks and the largest windows that planners write."""
    for number, (patch, mm) in enumerate(((128, 1.0), (160, 0.6), (192, 0.8))):
        spec = replace(SMALL, patch=(patch,) * 3, spacing_mm=(mm,) * 3)
        folder = build_folder(tmp_path / str(number), spec)
        open_member(find_members(folder)[0], InferenceSettings())


def test_no_lattice_is_resampled_that_no_memory_holds() -> None:
    tiny = Volume(np.zeros((2, 2, 2), np.float32), Grid((2, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), GRID.direction))
    with pytest.raises(InputRefused, match="too large"):
        resample_volume(tiny, replace(tiny.grid, size=(4000, 4000, 4000)))
    small: Triple = (0.001, 0.001, 0.001)
    with pytest.raises(InputRefused, match="too large"):
        NnunetResampling().resize(tiny.array[None], (4000, 4000, 4000), tiny.grid.spacing_mm, small)
    with pytest.raises(InputRefused, match="too large"):
        NnunetResampling().resize(tiny.array[None], (1, 1, 10_000_000), tiny.grid.spacing_mm, small)


def test_a_case_too_large_for_a_member_is_refused(tmp_path: Path) -> None:
    """A member that suits a brain meets an image that is none."""
    from ensemble.families.nnunet_v2.member import NnunetV2Member
    from ensemble.types import ignore_progress

    member = open_member(find_members(build_folder(tmp_path, SMALL))[0], InferenceSettings())
    assert isinstance(member, NnunetV2Member)
    case = prepare_raw(phantom_case())
    grid = replace(GRID, spacing_mm=(400.0, 400.0, 500.0))
    huge = replace(case, images={m: Volume(v.array, grid) for m, v in case.images.items()})
    with pytest.raises(InputRefused, match="too large"):
        member.predict(huge, InferenceSettings(), ignore_progress)


def test_warm_up_still_runs_on_its_small_phantom(
    stub_ensemble: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    from conftest import StubMember
    from ensemble.serve.warmup import warm_up

    warm_up(stub_ensemble(StubMember("one")))  # type: ignore[arg-type]
    assert not [record for record in caplog.records if "failed" in record.message]


def test_the_range_is_part_of_the_report() -> None:
    assert RunConfig().as_json()["brain_ml"] == (300.0, 2500.0)
    with pytest.raises(UsageError):
        RunConfig(brain_ml=(0.0, -1.0))
    assert WeightsBroken.exit_code == 4


@pytest.mark.parametrize("factors", [(1, 1, 0.5), (1, 1, 0.4), (0.5, 1, 1.5), (0.5, 1, 2), (1.3, 1.3, 0.5)])
def test_a_whole_brain_of_no_brains_shape_is_refused(factors: tuple[float, float, float]) -> None:
    """Slices 1 mm apart for 2 halve the lesion's volume, and the brain's is still that of a child."""
    raw = scaled(factors, DWI, ADC)
    raw = replace(raw, images={m: raw.images[m] for m in (DWI, ADC)})
    with pytest.raises(InputRefused, match="shape|size") as refusal:
        prepare_raw(raw, "never", brain_ml=(300.0, 4000.0))
    assert "slice spacing" in refusal.value.do


@pytest.mark.parametrize("slices", [slice(6, 16), slice(0, 11), slice(12, None)])
def test_a_slab_has_any_shape(slices: slice) -> None:
    raw = phantom_case()
    grid = replace(GRID, size=(40, 48, len(range(24)[slices])))
    images = {m: replace(i, volume=Volume(i.volume.array[slices], grid)) for m, i in raw.images.items()}
    prepare_raw(replace(raw, images=images), "never")
