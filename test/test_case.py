"""The checks between a file and a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GRID, phantom_case, phantom_lesion
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.prepare import case as prepare_case
from ensemble.prepare.case import STEPS, prepare_raw
from ensemble.prepare.draft import DraftCase
from ensemble.prepare.flair import check_flair_size
from ensemble.readers.base import RawCase
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR


def moved(mm: float) -> Grid:
    return replace(GRID, origin_mm=(GRID.origin_mm[0] + mm, *GRID.origin_mm[1:]))


def with_array(modality: Modality, change: Callable[[AnyArray], AnyArray]) -> RawCase:
    raw = phantom_case(flair=True)
    image = raw.images[modality]
    changed = replace(image, volume=image.volume.like(change(image.volume.array.copy())))
    return replace(raw, images={**raw.images, modality: changed})


def with_grid(modality: Modality, grid: Grid) -> RawCase:
    raw = phantom_case(flair=True)
    image = raw.images[modality]
    array = np.resize(image.volume.array, grid.shape_zyx)
    return replace(raw, images={**raw.images, modality: replace(image, volume=Volume(array, grid))})


def without(modality: Modality) -> RawCase:
    raw = phantom_case(flair=True)
    return replace(raw, images={m: image for m, image in raw.images.items() if m is not modality})


def one_voxel(array: AnyArray, value: float) -> AnyArray:
    array[12, 24, 20] = value
    return array


@pytest.mark.parametrize("modality", list(Modality))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * 0, "is constant"),
        (lambda a: a * 0 + 7, "is constant"),
        (lambda a: one_voxel(a, np.nan), "not finite"),
        (lambda a: one_voxel(a, np.inf), "not finite"),
        (lambda a: a * np.nan, "no finite value"),
    ],
)
@pytest.mark.slow
def test_images_without_a_picture_are_refused(
    modality: Modality, change: Callable[[AnyArray], AnyArray], message: str
) -> None:
    with pytest.raises(InputRefused, match=f"{modality.value.upper()} .*{message}") as refusal:
        prepare_raw(with_array(modality, change))
    assert refusal.value.where == f"{modality}.mha"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (without(DWI), "no DWI"),
        (without(ADC), "no ADC"),
        (with_grid(ADC, moved(500.0)), r"covers too little(.|\n)*at least 30% is needed"),
        (
            with_grid(ADC, replace(GRID, size=(40, 48, 13))),
            r"does not cover enough of the brain(.|\n)*at least 90% is needed",
        ),
        (with_grid(FLAIR, moved(500.0)), r"covers too little(.|\n)*at least 50% is needed"),
        (with_array(ADC, lambda a: -a), "ADC"),
    ],
)
def test_cases_that_do_not_fit_together_are_refused(raw: RawCase, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        prepare_raw(raw)


def test_headers_that_differ_by_rounding_are_accepted_and_recorded() -> None:
    case = prepare_raw(with_grid(ADC, moved(0.1)))
    assert case.images[ADC].grid == GRID
    assert [repair for repair in case.repairs if "0.025 voxels" in repair]
    assert prepare_raw(with_grid(ADC, moved(1e-5))).repairs == ()


def test_flair_is_resampled_onto_the_dwi_grid_and_recorded() -> None:
    thick = Grid((40, 48, 12), (4.0, 4.0, 10.0), GRID.origin_mm, GRID.direction)
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None] * 10 + 1, thick.shape_zyx)
    raw = with_grid(FLAIR, thick)
    raw = replace(raw, images={**raw.images, FLAIR: replace(raw.images[FLAIR], volume=Volume(ramp.copy(), thick))})
    case = prepare_raw(raw)
    assert case.images[FLAIR].grid == GRID
    assert case.images[FLAIR].array[2:22, 20, 20] == pytest.approx(np.arange(2, 22) * 5 + 1)  # linear along the slices
    assert "FLAIR resampled" in case.repairs[0]


def test_a_case_without_flair_is_whole() -> None:
    case = prepare_raw(without(FLAIR))
    assert case.modalities == {DWI, ADC}
    assert case.repairs == ()


def test_nothing_is_changed_in_place() -> None:
    raw = phantom_case(flair=True)
    before = {modality: image.volume.array.copy() for modality, image in raw.images.items()}
    case = prepare_raw(raw)
    assert all(np.array_equal(before[modality], image.volume.array) for modality, image in raw.images.items())
    assert np.array_equal(case.images[DWI].array, before[DWI])


def test_normal_tissue_is_one() -> None:
    case = prepare_raw(phantom_case(flair=True))
    for modality in Modality:
        inside = case.tissue_normalized[modality].array[case.brain.array]
        assert np.median(inside) == pytest.approx(1.0, abs=0.05)
        assert not case.tissue_normalized[modality].array[~case.brain.array].any()


@pytest.mark.parametrize(("scale", "hint"), [(1.25, "skull still there"), (0.7, "brain missing")])
def test_a_brain_of_implausible_size_is_remarked_upon(scale: float, hint: str) -> None:
    raw = phantom_case()
    grid = replace(GRID, spacing_mm=tuple(mm * scale for mm in GRID.spacing_mm))
    images = {m: replace(image, volume=Volume(image.volume.array, grid)) for m, image in raw.images.items()}
    assert hint in prepare_raw(replace(raw, images=images)).repairs[0]
    assert prepare_raw(raw).repairs == ()


def test_no_half_of_a_brain_in_two_pieces_is_lost() -> None:
    """Skull stripping may leave pieces that touch nowhere; a lesion in the smaller one must still be seen."""
    raw = phantom_case()
    images = {}
    for modality, image in raw.images.items():
        array = image.volume.array.copy()
        array[:, :, 24:26] = 0
        images[modality] = replace(image, volume=image.volume.like(array))
    case = prepare_raw(replace(raw, images=images))
    lesion = phantom_lesion()
    lesion[:, :, 24:26] = False
    assert lesion.any()
    assert case.brain.array[lesion].all()
    assert np.median(case.tissue_normalized[DWI].array[lesion]) > 1.8


@pytest.mark.parametrize(("first", "second"), [(DWI, ADC), (DWI, FLAIR), (ADC, FLAIR)])
def test_one_image_given_twice_is_refused(first: Modality, second: Modality) -> None:
    raw = phantom_case(flair=True)
    copy = replace(raw.images[first], path=Path("copy.mha"))
    with pytest.raises(
        InputRefused, match=f"{first.value.upper()} and {second.value.upper()} are the same image"
    ) as it:
        prepare_raw(replace(raw, images={**raw.images, second: copy}))
    assert it.value.where == "copy.mha"


@pytest.mark.parametrize(("mm", "refused"), [(1.0, False), (0.2, True), (5.0, True), (1e-9, True)])
def test_the_size_of_a_brain_on_fine_voxels_is_looked_at_too(mm: float, refused: bool) -> None:
    """On every other one: 1 mm is right, the others are headers that are wrong."""
    raw = phantom_case(flair=True)
    array = raw.images[FLAIR].volume.array.repeat(4, axis=1).repeat(4, axis=2)
    grid = replace(GRID, size=(160, 192, 24), spacing_mm=(mm, mm, 5.0))
    images = {**raw.images, FLAIR: replace(raw.images[FLAIR], volume=Volume(array, grid))}
    case = DraftCase(raw.name, {FLAIR: Path("flair")}, {m: image.volume for m, image in images.items()})
    if not refused:
        assert check_flair_size(case) == (case, ())
        return
    with pytest.raises(InputRefused, match="brain on FLAIR has an impossible size"):
        check_flair_size(case)


def test_a_flair_that_misses_part_of_the_brain_is_remarked_upon() -> None:
    upper = Grid((40, 48, 16), GRID.spacing_mm, tuple((GRID.affine @ (0, 0, 8, 1))[:3]), GRID.direction)  # type: ignore[arg-type]
    case = prepare_raw(with_grid(FLAIR, upper))
    assert [repair for repair in case.repairs if "covers only 7" in repair], case.repairs


def test_every_repair_says_which_step_made_it_and_of_which_image() -> None:
    raw = with_array(ADC, lambda a: np.where(a == 0, np.nan, a).astype(np.float32))
    images = {**raw.images, DWI: replace(raw.images[DWI], notes=("chosen by its name",))}
    images[FLAIR] = replace(raw.images[FLAIR], volume=Volume(raw.images[FLAIR].volume.array, moved(0.5)))
    case = prepare_raw(replace(raw, images=images))
    assert case.repairs == tuple(note.text for note in case.notes)
    assert [(note.step, note.image) for note in case.notes] == [
        ("readers", DWI),
        ("align_flair", FLAIR),
        ("zero_unusable_voxels", ADC),
        ("clear_background", FLAIR),
    ]


def test_published_members_see_the_noise_around_a_brain_and_others_do_not() -> None:
    """SWAN's FLAIR is not 0 in three voxels of four, and is normalised by all of these."""
    noise = np.random.default_rng(1).uniform(1, 4, GRID.shape_zyx).astype(np.float32)
    raw = with_array(DWI, lambda a: np.where(a == 0, noise, a))
    case = prepare_raw(raw)
    outside = ~case.brain.array
    assert any("was not 0: set to 0" in repair for repair in case.repairs)
    assert not case.images[DWI].array[outside].any()
    for modality in (DWI, ADC):
        np.testing.assert_array_equal(case.as_read[modality].array, raw.images[modality].volume.array)
    assert case.as_read.keys() == case.images.keys()
    assert case.as_read[ADC] is case.images[ADC], "what nobody changed takes no memory twice"


def test_of_several_faults_the_first_steps_is_told() -> None:
    """The order of the steps is a promise: a hospital's scripts read the first line."""
    assert [step.__name__ for step in STEPS] == [
        "check_complete",
        "check_values",
        "check_distinct",
        "check_scale",
        "align_adc",
        "extract_brain",
        "check_adc_coverage",
        "check_plausibility",
        "check_brain_volume",
        "check_adc_belongs_to_dwi",
        "check_flair_size",
        "align_flair",
        "zero_unusable_voxels",
        "clear_background",
        "note_cut_off_brain",
        "normalize_intensities",
    ]
    faulty = with_grid(FLAIR, moved(500.0))
    for modality, change, message in (
        (ADC, lambda a: one_voxel(a, np.nan), "FLAIR covers too little of the brain on DWI"),
        (ADC, lambda a: -a, "ADC"),
        (DWI, lambda a: a * 0, "DWI image is constant"),
    ):
        image = faulty.images[modality]
        changed = replace(image, volume=image.volume.like(change(image.volume.array.copy())))
        faulty = replace(faulty, images={**faulty.images, modality: changed})
        with pytest.raises(InputRefused, match=message):
            prepare_raw(faulty)


def test_a_step_changes_no_case_that_it_is_given() -> None:
    raw = with_array(ADC, lambda a: np.where(a == 0, np.nan, a).astype(np.float32))
    images = {modality: image.volume for modality, image in raw.images.items()}
    case = DraftCase("one", {modality: Path(f"{modality}.mha") for modality in images}, images)
    for step in STEPS:
        before = {modality: (volume, volume.array.tobytes()) for modality, volume in case.images.items()}
        brain = case.brain.tobytes()
        after, _ = step(case)
        assert {m: (volume, volume.array.tobytes()) for m, volume in case.images.items()} == before
        assert case.brain.tobytes() == brain
        case = after


@pytest.mark.parametrize("change", [lambda a: a + 50, lambda a: a + 5000, lambda a: 1000 - a])
def test_a_dwi_of_shifted_or_inverted_values_is_refused(change: Callable[[AnyArray], AnyArray]) -> None:
    """As by a wrong scl_inter: contrast is lost, and lesions with it."""
    raw = phantom_case(flair=True)
    image = raw.images[DWI]
    odd = replace(image, volume=image.volume.like(change(image.volume.array).astype(np.float32)))
    with pytest.raises(InputRefused, match="background of the DWI image is as bright as tissue"):
        prepare_raw(replace(raw, images={**raw.images, DWI: odd}))
    faint = replace(image, volume=image.volume.like(np.maximum(image.volume.array, np.float32(2))))
    prepare_raw(replace(raw, images={**raw.images, DWI: faint}))


def test_a_case_is_prepared_as_a_run_s_choices_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """`members check --compare` had left --registration out."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(prepare_case, "prepare_raw", lambda *choices: asked.append(choices))
    config = RunConfig(skull_strip="never", brain_ml=(100.0, 900.0), registration="never")
    prepare_case.prepare_for_run(phantom_case(), config, "cuda")
    (given,) = asked
    assert given[1:] == ("never", "cuda", (100.0, 900.0), "never", True)
    chosen = set(inspect.signature(prepare_raw).parameters) - {"raw", "device"}
    assert len(given) == len(chosen) + 2, "every choice of `prepare_raw` is one of a run"
