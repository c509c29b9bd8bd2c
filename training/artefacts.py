"""What goes wrong in the scanner: susceptibility distortion and pile-up of echo-planar images, coil shading, ghosts.

An infarct is one-sided and lowers or keeps ADC; pile-up is nearly symmetric, sits where air meets bone, and is a gain on b0 and DWI
alike, so that ADC, a ratio, doesn't see it (Jezzard & Balaban, Magn Reson Med 1995).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.anatomy import bounding_box
from training.draw import Draw

# Air-filled cavities under the brain, as shares of the brain's box measured from its centre (z: up, y: to anterior,
# x: sideways; 1 = the box's edge), whether both sides have one, and the largest distortion in mm that they cause nearby.
CAVITIES = {
    "frontal sinus": ((-0.15, 1.05, 0.12), True, 7.0),
    "sphenoid sinus": ((-0.55, 0.45, 0.0), False, 10.0),
    "petrous and mastoid": ((-0.75, -0.02, 0.72), True, 11.0),
    "ear canal": ((-0.62, 0.15, 0.95), True, 8.0),
    "mastoid, rear": ((-0.85, -0.40, 0.65), True, 6.0),
}


def susceptibility_shift(mask: Tensor, draw: Draw) -> Tensor:
    """Displacement in mm along y (the phase-encoding axis) at every voxel of a 1 mm grid (z, y, x).

    Sum of the dipole fields of air spheres, (a/r)^3 (3 cos^2 theta - 1) with theta to B0 (z) (Schenck, Med Phys 1996),
    and a smooth shim residue.
    """
    shape = mask.shape
    low = [max(8, n // 3) for n in shape]
    centre, half = box_of(mask)
    axes = [torch.linspace(0, n - 1, m, device=mask.device) for n, m in zip(shape, low, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    shift = torch.zeros(low, device=mask.device)
    sign = draw.choice((-1.0, 1.0))
    overall = draw.lognormal(0.8, 0.5)
    for place, paired, most_mm in CAVITIES.values():
        common = most_mm * overall * draw.uniform(0.1, 1.0)
        jitter = [draw.normal(0, 0.07) for _ in range(3)]
        radius = draw.uniform(8, 18)
        for side in (-1, 1) if paired else (1,):
            at = [c + h * (p + j) for c, h, p, j in zip(centre, half, place, jitter, strict=True)]
            at[2] = centre[2] + side * (at[2] - centre[2]) + draw.normal(0, 2)
            dz, dy, dx = z - at[0] - draw.normal(0, 2), y - at[1] - draw.normal(0, 2), x - at[2]
            distance = torch.sqrt(dz**2 + dy**2 + dx**2).clamp_min(1.0)
            angle = 3 * (dz / distance) ** 2 - 1
            near = radius * draw.lognormal(1.0, 0.1)
            shift += sign * common * draw.lognormal(1.0, 0.15) * angle * (near / distance.clamp_min(near)) ** 3
    full = F.interpolate(shift[None, None], size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]
    return full + draw.uniform(0, 1.0) * draw.field(shape, 60.0)[0]


def box_of(mask: Tensor) -> tuple[list[float], list[float]]:
    """Centre and half-size of the mask's bounding box, in voxels (z, y, x)."""
    box = bounding_box(mask > 0, 0)
    return [(s.start + s.stop - 1) / 2 for s in box], [max(1.0, (s.stop - s.start - 1) / 2) for s in box]


def displace(images: Tensor, shift_mm: Tensor) -> Tensor:
    """Move signal along y by `shift_mm`; signal is conserved, so it piles up where the shift converges.

    Args:
        images: (channels, z, y, x) at 1 mm.
        shift_mm: (z, y, x).
    """
    length = images.shape[2]
    target = torch.arange(length, device=images.device, dtype=torch.float32).view(1, -1, 1) + shift_mm
    lower = target.floor()
    share = target - lower
    moved = torch.zeros_like(images)
    for offset, weight in ((0, 1 - share), (1, share)):
        index = (lower + offset).clamp(0, length - 1).long()
        for channel in range(images.shape[0]):
            moved[channel].scatter_add_(1, index, images[channel] * weight)
    return moved


def coil_shading(shape: tuple[int, ...] | torch.Size, draw: Draw) -> Tensor:
    """Smooth multiplicative gain (z, y, x) on a grid of 1 mm: receive sensitivity that was not fully corrected."""
    strength = draw.uniform(0.0, 0.14)
    return torch.exp(strength * draw.field(shape, 70.0)[0])


def ghost(image: Tensor, strength: float) -> Tensor:
    """Nyquist ghost of echo-planar imaging: a faint copy shifted by half the field of view along y."""
    return image + strength * torch.roll(image, image.shape[1] // 2, dims=1)


# Where bright rims stay after reconstruction, as shares of the brain's box (z, y, |x|), and their spread in the same unit.
RIMS = (
    ((-0.62, 0.02, 0.75), (0.12, 0.22, 0.18)),  # petrous ridge: lower temporal lobe
    ((-0.55, 0.35, 0.62), (0.12, 0.15, 0.18)),  # temporal pole
    ((-0.48, 0.25, 0.75), (0.12, 0.06, 0.22)),  # middle fossa: a band across the temporal lobe
    ((-0.44, -0.03, 0.62), (0.07, 0.05, 0.20)),  # a line above the petrous bone
    ((-0.25, 0.92, 0.15), (0.12, 0.06, 0.22)),  # orbitofrontal
    ((0.08, 0.84, 0.13), (0.12, 0.08, 0.10)),  # frontal poles, inner side
    ((0.15, 0.80, 0.18), (0.12, 0.07, 0.12)),  # the same, higher and further out
    ((0.10, 0.97, 0.20), (0.25, 0.04, 0.25)),  # frontal pole
    ((0.15, 0.95, 0.30), (0.10, 0.05, 0.15)),  # frontal pole, beside the midline
    ((0.10, 0.85, 0.35), (0.20, 0.12, 0.30)),  # along the frontal convexity
    ((-0.30, -0.95, 0.25), (0.20, 0.05, 0.25)),  # occipital pole
    ((-0.80, -0.60, 0.55), (0.12, 0.15, 0.18)),  # cerebellar rim
    ((-0.75, -0.35, 0.60), (0.12, 0.12, 0.15)),  # cerebellum at the sigmoid sinus
)


def rim_gain(mask: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Gain (>= 0.3) on DWI from pile-up near the skull base, and the factor on ADC, cheap enough for every training step.

    ADC, a ratio, should not see pile-up; in patients the bright rims of the frontal and occipital poles often show a low ADC all
    the same (b0 and DWI are distorted differently by eddy currents, and CSF is pushed out), so some bands lower it.

    Args:
        mask: brain (z, y, x) 0/1 on any grid, y to anterior; bands follow the mask's rim and are nearly symmetric.
    """
    gain = torch.ones(mask.shape, device=mask.device)
    dimming = torch.ones(mask.shape, device=mask.device)
    centre, half = box_of(mask)
    axes = [(torch.arange(n, device=mask.device) - c) / h for n, c, h in zip(mask.shape, centre, half, strict=True)]
    width, steepness = draw.choice(((3, 3.0), (5, 2.5), (7, 2.2)))
    inside = F.avg_pool3d(mask[None, None].float(), (1, width, width), 1, (0, width // 2, width // 2))[0, 0]
    rim = (steepness * (1 - inside)).clamp(0, 1) * mask
    patches = _patches(mask.shape, draw).to(mask.device)
    for place, spread in RIMS:
        if not draw.chance(0.55):
            continue
        at = [p + draw.normal(0, 0.08) for p in place]
        wide = [s * draw.lognormal(1.0, 0.35) for s in spread]
        height = draw.lognormal(0.8, 0.75)
        hugging = draw.chance(0.45)
        if draw.chance(0.4):  # signal piles up along y: a thin, very bright line
            wide[1] *= draw.uniform(0.25, 0.7)
            height *= draw.uniform(1.0, 2.0)
        lowered = draw.uniform(0.05, 0.6) if draw.chance(0.6) else 0.0
        patchy = draw.chance(0.6)
        shadow = draw.uniform(0.05, 0.35) if draw.chance(0.4) else 0.0  # where the piled-up signal came from
        fainter = draw.choice((-1, 1)) if draw.chance(0.2) else 0  # air cells differ: one side may hardly show it
        for side in (-1, 1):
            own = height * draw.lognormal(1.0, 0.5) * (0.2 if side == fainter else 1.0)
            parts = [
                torch.exp(-0.5 * ((axis - a) / w) ** 2)
                for axis, a, w in zip(axes, (at[0], at[1], side * at[2] + draw.normal(0, 0.04)), wide, strict=True)
            ]
            bump = parts[0][:, None, None] * parts[1][:, None] * parts[2]
            ripple = torch.sin(axes[1] * half[1] * draw.uniform(0.3, 1.2) + draw.uniform(0, 2 * math.pi))[:, None]
            band = bump * (rim if hugging else 0.7 + 0.3 * ripple)
            if patchy:
                band = band * patches
            gain = gain + own * band - shadow * torch.roll(bump, -round(1.5 * wide[1] * half[1]), 1)
            dimming = dimming * (1 - lowered * band.clamp(0, 1))
    return gain.clamp_min(0.3), dimming


def _patches(shape: torch.Size, draw: Draw) -> Tensor:
    """Islands (z, y, x), 0-1, some voxels wide: pile-up follows folds and vessels, and is broken into pieces as emboli are."""
    cell = draw.uniform(2.0, 6.0)
    knots = draw.randn([1, 1, *(max(2, round(n / cell)) for n in shape)])
    field = F.interpolate(knots, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]
    return (3.0 * (field - draw.uniform(-0.5, 0.6))).clamp(0, 1)
