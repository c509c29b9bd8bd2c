"""Infarcts: where they lie (real shapes, emboli, lacunes, cortical ribbons) and what they do to the tissue as they age.

Physics of age: diffusion falls within minutes to 0.4-0.7 of normal, returns through normal values ("pseudo-normalisation")
after 1-2 weeks and rises beyond; T2 rises from some 6-12 hours on and keeps subacute lesions bright on DWI (Lansberg et al.,
AJNR 2001; Schlaug et al., Neurology 1997; Fung et al., 2011).
"""

from __future__ import annotations

import io
import lzma
import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.anatomy import Person, blur, material, to_grid_sample
from training.draw import Draw
from training.tissues import CSF_CLASSES, ParameterMaps, Tissue

LEFT_OF_SHAPE = 0.8  # of a shape's volume, once CSF and other heads' sizes have taken their part
EMBOLUS_SPREAD = 0.4  # of the logarithm of radii
OUTLINED_SHARE = 0.3  # of a lesion's full severity, from which on a reader outlines
EMBOLI_ONLY_SHARE = 0.2  # of the patients with a lesion: a shower of emboli and nothing else
SHOWER_ML, SHOWER_COUNT = (0.06, 0.7, 6.0), (1, 6, 40)  # their volume and number: least, median, most
HELD_OUT_EVERY = 10  # every tenth lesion shape is kept for validation
EVERYWHERE: tuple[slice, ...] = (slice(None),)
MASKS = "lesions/soop_mni_masks.npz.xz"

# ISLES'22 training set, 250 cases (Hernandez Petzsche et al., Scientific Data 2022): total lesion volume and number of components.
VOLUME_PROBABILITIES = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 1.0)
VOLUME_ML = (0.05, 0.19, 0.44, 1.6, 6.6, 21.0, 60.0, 108.0, 250.0)
COUNT_PROBABILITIES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 1.0)
COUNTS = (1.0, 1.0, 2.0, 5.0, 12.0, 20.0, 90.0)


@dataclass(frozen=True)
class LesionLibrary:
    """Masks of acute lesions in MNI space, (z, y, x) at 1 mm with x to the patient's left."""

    packed: np.ndarray  # (n, bytes)
    shape: tuple[int, int, int]  # as stored: (x, y, z)
    volumes_ml: np.ndarray  # (n,)
    brain_box: tuple[tuple[int, int], ...]  # (z, y, x): first and last voxel of the brain in MNI space

    def part(self, *, held_out: bool) -> LesionLibrary:
        """The shapes that are kept for validation, or the others."""
        chosen = (np.arange(len(self.volumes_ml)) % HELD_OUT_EVERY == 0) == held_out
        return replace(self, packed=self.packed[chosen], volumes_ml=self.volumes_ml[chosen])

    def mask(self, index: int) -> np.ndarray:
        """One mask as uint8 (z, y, x)."""
        flat = np.unpackbits(self.packed[index])[: math.prod(self.shape)]
        return flat.reshape(self.shape).transpose(2, 1, 0)


@cache
def load_lesions(shared: Path) -> LesionLibrary:
    """Load the lesion library (takes some seconds)."""
    with np.load(io.BytesIO(lzma.decompress(material(shared, MASKS).read_bytes()))) as archive:
        packed, shape = archive["packed"], tuple(int(n) for n in archive["shape"])
    volumes = np.bitwise_count(packed).sum(axis=1, dtype=np.int64) / 1000.0
    # The MNI152 brain (without CSF) spans x -72..72, y -106..73, z -60..80 mm; the archive's affine is x = 78 - i,
    # y = j - 112, z = k - 50, so its lowest slices are cut off.
    box = ((0, 130), (6, 185), (6, 150))
    return LesionLibrary(packed, (shape[0], shape[1], shape[2]), volumes, box)


@dataclass
class Damage:
    """What all lesions together do, on the person's 1 mm grid; each a tensor (z, y, x)."""

    acute: Tensor  # 0-1: share of the voxel that a reader would outline
    log_adc: Tensor  # factor on ADC, as its natural logarithm
    log_t2: Tensor  # factor on T2
    log_t1: Tensor
    old: Tensor = field(repr=False)  # 0-1: chronic damage, not to be outlined

    @classmethod
    def none(cls, like: Tensor) -> Damage:
        return cls(*(torch.zeros(like.shape, device=like.device) for _ in range(5)))

    def apply(self, maps: ParameterMaps) -> ParameterMaps:
        """The parameter maps of the damaged brain."""
        return ParameterMaps(
            maps.proton_density * (1 + 0.1 * self.old + 0.03 * self.acute),
            maps.t1_ms * torch.exp(self.log_t1),
            maps.t2_ms * torch.exp(self.log_t2),
            maps.adc * torch.exp(self.log_adc),
        )


@dataclass(frozen=True)
class LesionStage:
    """The stage of an infarct: factors on ADC and T2 at full severity."""

    adc: float
    t2: float


# How much brighter than normal tissue the core of a lesion is on DWI, at b = 1000 s/mm^2 and TE = NOMINAL_TE_MS: median and spread
# (of the logarithm) over patients, and range. Public ISLES'22 cases have case medians of 1.4, 1.6 and 2.0, borders included.
CONTRAST_MEDIAN, CONTRAST_SPREAD, CONTRAST_RANGE = 2.0, 0.27, (1.4, 3.5)
NORMAL_ADC, NORMAL_T2_MS, NOMINAL_TE_MS = 0.75, 85.0, 85.0
HIGHEST_T2 = 2.8  # times normal
# Age of the event: share of the patients up to here, range of ADC (times normal), and median contrast. A hyperacute lesion's T2 is normal:
# ADC alone makes its contrast. A subacute one's ADC is back to normal: T2 alone does.
HYPERACUTE_SHARE, HYPERACUTE_ADC, HYPERACUTE_T2 = 0.12, (0.35, 0.65), (1.0, 1.15)
LATER_STAGES = ((0.55, (0.4, 0.75), CONTRAST_MEDIAN), (0.77, (0.7, 0.95), CONTRAST_MEDIAN), (1.0, (0.9, 1.2), 1.75))


def draw_stage(draw: Draw) -> LesionStage:
    """Hyperacute, acute, early subacute or subacute."""
    kind = draw.uniform(0, 1)
    if kind < HYPERACUTE_SHARE:
        return LesionStage(draw.uniform(*HYPERACUTE_ADC), draw.uniform(*HYPERACUTE_T2))
    _, adc_range, median = next(stage for stage in LATER_STAGES if kind <= stage[0])
    adc = draw.uniform(*adc_range)
    contrast = min(max(draw.lognormal(median, CONTRAST_SPREAD), CONTRAST_RANGE[0]), CONTRAST_RANGE[1])
    return LesionStage(adc, t2_for(contrast, adc))


def t2_for(contrast: float, adc: float) -> float:
    """The factor on T2 with which DWI shows `contrast` at an ADC of `adc` times normal (both solved from the signal equation)."""
    by_t2 = math.log(contrast) - NORMAL_ADC * (1 - adc)
    return min(HIGHEST_T2, 1 / max(1 - max(by_t2, 0.0) * NORMAL_T2_MS / NOMINAL_TE_MS, 1 / HIGHEST_T2))


def vary(stage: LesionStage, draw: Draw) -> LesionStage:
    """The same event a little earlier or later: components of one patient differ."""
    return LesionStage(stage.adc * draw.lognormal(1.0, 0.12), max(1.0, stage.t2 * draw.lognormal(1.0, 0.1)))


def draw_damage(person: Person, library: LesionLibrary, draw: Draw, lesion_free: bool) -> Damage:
    """Everything that is wrong with this person's brain."""
    tissue = tissue_share(person.classes)
    damage = Damage.none(tissue)
    add_chronic(damage, person, tissue, library, draw)
    if lesion_free:
        return damage
    if draw.chance(EMBOLI_ONLY_SHARE):
        add_shower(damage, person, tissue, draw)
    else:
        add_acute(damage, person, tissue, library, draw)
    return damage


def tissue_share(classes: Tensor) -> Tensor:
    """1 in brain tissue, 0 in CSF and outside."""
    dry = classes > 0
    for csf in CSF_CLASSES:
        dry &= classes != csf
    return dry.float()


def add_acute(damage: Damage, person: Person, tissue: Tensor, library: LesionLibrary, draw: Draw) -> None:
    """Draw volume and count from ISLES'22's figures, then a territorial lesion, emboli, lacunes or ribbons to match."""
    volume_ml = draw.quantile(VOLUME_PROBABILITIES, VOLUME_ML)
    count = round(draw.quantile(COUNT_PROBABILITIES, COUNTS))
    stage = draw_stage(draw)
    strength = draw.uniform(0.5, 0.8) if draw.chance(0.1) else draw.uniform(0.85, 1.0)  # some lesions are faint
    territorial = volume_ml > 1.5 or draw.chance(0.4)
    if territorial:
        shape = warped_shape(person, library, volume_ml / LEFT_OF_SHAPE, draw)
        insert(damage, shape * tissue, shape, stage, strength, draw)
    small = count - 1 if territorial else count
    if small > 0:
        radius_mm = embolus_radius_mm(volume_ml / small, 2.0) if territorial else embolus_radius_mm(volume_ml / small)
        add_emboli(damage, person, tissue, small, radius_mm, stage, draw)
    if volume_ml > 5.0 and draw.chance(0.25):
        add_ribbon(damage, person, tissue, vary(stage, draw), draw)


def add_shower(damage: Damage, person: Person, tissue: Tensor, draw: Draw) -> None:
    """Add a shower of emboli without any other lesion."""
    volume_ml = min(max(draw.lognormal(SHOWER_ML[1], 1.0), SHOWER_ML[0]), SHOWER_ML[2])
    count = min(max(round(draw.lognormal(SHOWER_COUNT[1], 0.8)), SHOWER_COUNT[0]), SHOWER_COUNT[2])
    add_emboli(damage, person, tissue, count, embolus_radius_mm(volume_ml / count), draw_stage(draw), draw)


def embolus_radius_mm(volume_ml: float, most_mm: float = 8.0) -> float:
    """Median radius of emboli whose mean volume is `volume_ml`: lognormal radii spread by `EMBOLUS_SPREAD`; seen at 2 mm at least."""
    alike = (3000 * volume_ml / (4 * math.pi)) ** (1 / 3)
    return min(max(alike / math.exp(1.5 * EMBOLUS_SPREAD**2), 1.3), most_mm)


def near_volume(library: LesionLibrary, volume_ml: float, draw: Draw) -> int:
    """The index of a random shape of about this volume."""
    away = np.abs(np.log(np.maximum(library.volumes_ml, 1e-3) / volume_ml))
    near = np.flatnonzero(away < 0.4)
    if near.size == 0:
        near = np.argsort(away)[:5]
    return int(near[draw.integer(0, near.size)])


def warped_shape(person: Person, library: LesionLibrary, volume_ml: float, draw: Draw) -> Tensor:
    """A real lesion's mask of about `volume_ml`, carried to this person: soft 0-1 tensor (z, y, x)."""
    mask = torch.from_numpy(library.mask(near_volume(library, volume_ml, draw)).copy()).to(draw.device).float()
    if draw.chance(0.5):
        mask = mask.flip(2)
    half = F.interpolate(
        person.source.permute(3, 0, 1, 2)[None], scale_factor=0.5, mode="trilinear", align_corners=False
    )
    coordinates = half[0].permute(1, 2, 3, 0).clone()
    rough = draw.field(coordinates.shape[:3], 6.0, 3).permute(1, 2, 3, 0)
    for axis in range(3):
        first, last = library.brain_box[axis]
        margin, length = 6, person.head_shape[axis] - 12
        stretch = draw.lognormal(1.0, 0.06)
        middle = (first + last) / 2
        at = (coordinates[..., axis] - margin) / length * (last - first) + first
        coordinates[..., axis] = (at - middle) * stretch + middle + draw.normal(0, 3.0) + 1.3 * rough[..., axis]
    sampled = F.grid_sample(mask[None, None], to_grid_sample(coordinates, mask.shape), align_corners=True)
    full = F.interpolate(sampled, size=tuple(person.classes.shape), mode="trilinear", align_corners=False)[0, 0]
    sharpness = draw.uniform(3.0, 9.0)
    return ((full - 0.5) * sharpness + 0.5).clamp(0, 1)


def insert(damage: Damage, where: Tensor, outline: Tensor, stage: LesionStage, strength: float, draw: Draw) -> None:
    """Let tissue die: `where` (0-1, tissue only) at `stage`; a reader outlines `outline`. All on the whole grid."""
    patchy = draw.uniform(0.0, 0.35)
    texture = 1 - patchy * (draw.field(where.shape, draw.uniform(4, 12))[0]).clamp(-1, 2).add(1).div(3)
    severity = where * (strength * texture).clamp(0, 1)
    _merge(damage, severity, stage, EVERYWHERE)
    damage.acute.copy_(torch.maximum(damage.acute, _reader_outline(severity / strength, outline)))


def _reader_outline(share: Tensor, outline: Tensor) -> Tensor:
    """What is damaged by a fair share of the lesion's worst; readers close their outlines over sulci between damaged gyri."""
    damaged = (share > OUTLINED_SHARE).float()
    closed = (blur(damaged, 1.4) > 0.42).float() * (outline > 0.4)
    return torch.maximum(damaged, closed)


def _merge(damage: Damage, severity: Tensor, stage: LesionStage, window: tuple[slice, ...]) -> None:
    adc, t2 = math.log(stage.adc) * severity, math.log(stage.t2) * severity
    stronger = adc.abs() + t2.abs() > damage.log_adc[window].abs() + damage.log_t2[window].abs()
    damage.log_adc[window] = torch.where(stronger, adc, damage.log_adc[window])
    damage.log_t2[window] = torch.where(stronger, t2, damage.log_t2[window])
    damage.log_t1[window] = torch.where(stronger, 0.5 * t2, damage.log_t1[window])


def add_emboli(
    damage: Damage, person: Person, tissue: Tensor, count: int, radius_mm: float, stage: LesionStage, draw: Draw
) -> None:
    """Scattered small infarcts: in one territory or everywhere, mostly at the grey-white border; some lacunes in deep tissue."""
    cortex, deep = person.classes == Tissue.CORTEX, _deep(person.classes)
    rim = torch.nonzero(cortex | (person.classes == Tissue.CEREBELLAR_CORTEX))
    anywhere = torch.nonzero((tissue > 0) & ~cortex)
    inside = torch.nonzero(deep)
    if min(len(rim), len(anywhere), len(inside)) == 0:
        return
    scattered = draw.chance(0.4)
    hub, reach = rim[draw.integer(0, len(rim))], draw.uniform(15, 45)
    for _ in range(count):
        kind = draw.uniform(0, 1)
        pool = rim if kind < 0.5 else anywhere if kind < 0.8 else inside
        centre = pool[draw.integer(0, len(pool))]
        if not scattered:
            tries = pool[torch.tensor([draw.integer(0, len(pool)) for _ in range(30)])]
            close = (tries - hub).float().norm(dim=1)
            centre = tries[int(close.argmin())] if close.min() > reach else tries[int((close < reach).nonzero()[0])]
        radius = min(draw.lognormal(radius_mm, EMBOLUS_SPREAD), 8.0) * (1.3 if pool is inside else 1.0)
        strength = draw.uniform(0.5, 0.8) if draw.chance(0.2) else draw.uniform(0.85, 1.0)
        _add_ellipsoid(damage, tissue, centre.tolist(), radius, vary(stage, draw), strength, draw)


def _deep(classes: Tensor) -> Tensor:
    deep = torch.zeros_like(classes, dtype=torch.bool)
    for tissue in (Tissue.THALAMUS, Tissue.PUTAMEN, Tissue.CAUDATE, Tissue.PALLIDUM, Tissue.BRAINSTEM):
        deep |= classes == tissue
    return deep


def _ellipsoid(shape: torch.Size, centre: list[int], radius_mm: float, draw: Draw) -> tuple[tuple[slice, ...], Tensor]:
    """A lumpy ellipsoid (soft 0-1) and the window it lies in."""
    reach = math.ceil(1.8 * radius_mm) + 2
    window = tuple(slice(max(0, c - reach), min(n, c + reach + 1)) for c, n in zip(centre, shape, strict=True))
    axes = [torch.arange(s.start, s.stop, dtype=torch.float32) - c for s, c in zip(window, centre, strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    orientation = torch.linalg.qr(draw.randn((3, 3)).cpu())[0]
    ratios = torch.tensor([draw.lognormal(1.0, 0.25) for _ in range(3)])
    distance = ((points @ orientation) / (radius_mm * ratios)).norm(dim=-1).to(draw.device)
    lumps = 0.15 * draw.field(distance.shape, 3.0)[0]
    return window, ((1 - distance + lumps) * radius_mm / 0.8 + 0.5).clamp(0, 1)


def _add_ellipsoid(
    damage: Damage, tissue: Tensor, centre: list[int], radius_mm: float, stage: LesionStage, strength: float, draw: Draw
) -> None:
    window, shape = _ellipsoid(tissue.shape, centre, radius_mm, draw)
    severity = shape * tissue[window] * strength
    _merge(damage, severity, stage, window)
    damage.acute[window] = torch.maximum(damage.acute[window], (severity > OUTLINED_SHARE * strength).float())


def add_ribbon(damage: Damage, person: Person, tissue: Tensor, stage: LesionStage, draw: Draw) -> None:
    """An infarct of a stretch of cortex with little white matter."""
    cortex = torch.nonzero(person.classes == Tissue.CORTEX)
    if len(cortex) == 0:
        return
    centre = cortex[draw.integer(0, len(cortex))].tolist()
    window, shape = _ellipsoid(tissue.shape, centre, draw.uniform(5, 13), draw)
    ribbon = blur((person.classes[window] == Tissue.CORTEX).float(), 0.7) * tissue[window]
    strength = draw.uniform(0.6, 1.0)
    severity = shape * (1.3 * ribbon).clamp(0, 1) * strength
    _merge(damage, severity, stage, window)
    damage.acute[window] = torch.maximum(damage.acute[window], _reader_outline(severity / strength, shape))


def add_chronic(damage: Damage, person: Person, tissue: Tensor, library: LesionLibrary, draw: Draw) -> None:
    """Hard negatives: white-matter hyperintensities, old infarcts with a cavity, old lacunes."""
    if draw.chance(0.7):
        _add_hyperintensities(damage, person, draw)
    if draw.chance(0.2):
        volume_ml = draw.lognormal(4.0, 1.2)
        _add_scar(damage, EVERYWHERE, warped_shape(person, library, volume_ml, draw) * tissue, draw)
    deep = torch.nonzero((_deep(person.classes) | (person.classes == Tissue.WHITE)) & (tissue > 0))
    for _ in range(draw.integer(0, 5) if draw.chance(0.4) and len(deep) else 0):
        window, shape = _ellipsoid(
            tissue.shape, deep[draw.integer(0, len(deep))].tolist(), draw.lognormal(2.2, 0.35), draw
        )
        _add_scar(damage, window, shape * tissue[window], draw)


def _add_scar(damage: Damage, window: tuple[slice, ...], shape: Tensor, draw: Draw) -> None:
    """Gliosis around, CSF within: ADC 1.4-3.5 times normal, T2 1.5-8 times."""
    adc, t2 = math.log(draw.uniform(1.3, 3.3)) * shape, math.log(draw.uniform(1.4, 6.0)) * shape
    damage.log_adc[window] = torch.maximum(damage.log_adc[window], adc)
    damage.log_t2[window] = torch.maximum(damage.log_t2[window], t2)
    damage.log_t1[window] = torch.maximum(damage.log_t1[window], 0.6 * t2)
    damage.old[window] = torch.maximum(damage.old[window], shape)


def _add_hyperintensities(damage: Damage, person: Person, draw: Draw) -> None:
    """White-matter hyperintensities: caps and bands around the ventricles, spots in the deep white matter."""
    white = (person.classes == Tissue.WHITE).float()
    near = blur((person.classes == Tissue.VENTRICLE).float(), 4.0)
    score = 3.0 * near + 0.5 * draw.field(white.shape, 7.0)[0] - draw.uniform(0.5, 1.3)
    depth = (blur(white, 2.5) * 2 - 1).clamp(0, 1)
    extent = (2.0 * score).clamp(0, 1) * white * depth
    adc, t2 = math.log(draw.uniform(1.0, 1.45)), math.log(draw.uniform(1.15, 1.6))
    damage.log_adc += adc * extent
    damage.log_t2 += t2 * extent
    damage.log_t1 += 0.5 * t2 * extent
    damage.old.copy_(torch.maximum(damage.old, extent))
