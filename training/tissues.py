"""Tissue classes, their NMR parameters at 3 T, and how FreeSurfer labels map to them.

Sources: T1, T2: Stanisz et al., Magn Reson Med 2005 (grey matter T1 1820/T2 99 ms, white matter 1084/69 ms at 3 T);
Wansapura et al., JMRI 1999 (regional T2 at 3 T: deep grey nuclei shortened by iron). ADC: Helenius et al., AJNR 2002 and
Sener, 2001 (white matter 0.68-0.75, cortex 0.78-0.89, thalamus 0.73-0.78, cerebellum 0.66-0.75, CSF 2.9-3.2 in
1e-3 mm^2/s). Proton density: Abbas et al., 2015 (relative to water).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from training.draw import Draw


class Tissue(IntEnum):
    """Classes of the simulator's label maps."""

    OUTSIDE = 0
    WHITE = 1
    CORTEX = 2
    CSF = 3
    CEREBELLAR_WHITE = 4
    CEREBELLAR_CORTEX = 5
    THALAMUS = 6
    CAUDATE = 7
    PUTAMEN = 8
    PALLIDUM = 9
    BRAINSTEM = 10
    HIPPOCAMPUS = 11
    VENTRAL_DIENCEPHALON = 12
    CHOROID_PLEXUS = 13
    VENTRICLE = 14


@dataclass(frozen=True)
class Parameters:
    """NMR parameters of one tissue: mean over people, and the standard deviation of ADC and T2 between people."""

    proton_density: float  # relative to water
    t1_ms: float
    t2_ms: float
    adc: float  # 1e-3 mm^2/s
    t2_spread: float = 0.06  # standard deviation of log T2
    adc_spread: float = 0.035  # standard deviation of log ADC


TISSUES: dict[Tissue, Parameters] = {
    Tissue.OUTSIDE: Parameters(0.0, 1000, 70, 0.8),
    Tissue.WHITE: Parameters(0.70, 1000, 72, 0.74),
    Tissue.CORTEX: Parameters(0.83, 1500, 92, 0.85),
    Tissue.CSF: Parameters(1.0, 4300, 1200, 3.0, 0.2, 0.04),
    Tissue.CEREBELLAR_WHITE: Parameters(0.72, 1000, 78, 0.70),
    Tissue.CEREBELLAR_CORTEX: Parameters(0.84, 1400, 95, 0.78),
    Tissue.THALAMUS: Parameters(0.78, 1250, 76, 0.76),
    Tissue.CAUDATE: Parameters(0.81, 1350, 80, 0.77),
    Tissue.PUTAMEN: Parameters(0.80, 1300, 72, 0.76),
    Tissue.PALLIDUM: Parameters(0.72, 1050, 55, 0.78, 0.12),
    Tissue.BRAINSTEM: Parameters(0.73, 1100, 76, 0.76),
    Tissue.HIPPOCAMPUS: Parameters(0.84, 1500, 100, 0.88),
    Tissue.VENTRAL_DIENCEPHALON: Parameters(0.74, 1100, 68, 0.75),
    Tissue.CHOROID_PLEXUS: Parameters(0.90, 2000, 200, 1.7, 0.35, 0.25),
    Tissue.VENTRICLE: Parameters(1.0, 4300, 1500, 3.1, 0.2, 0.04),
}

# FreeSurfer numbers (and SynthSeg's 136/137/163/164: what lines the lateral ventricles) of one hemisphere and the other.
FREESURFER: dict[Tissue, tuple[int, ...]] = {
    Tissue.WHITE: (2, 41, 77, 78, 79, 25, 57, 85, 251, 252, 253, 254, 255),
    Tissue.CORTEX: (3, 42, 26, 58),
    Tissue.CSF: (24, 30, 62, 15),
    Tissue.VENTRICLE: (4, 43, 5, 44, 14, 72),
    Tissue.CEREBELLAR_WHITE: (7, 46),
    Tissue.CEREBELLAR_CORTEX: (8, 47),
    Tissue.THALAMUS: (10, 49),
    Tissue.CAUDATE: (11, 50),
    Tissue.PUTAMEN: (12, 51),
    Tissue.PALLIDUM: (13, 52),
    Tissue.BRAINSTEM: (16,),
    Tissue.HIPPOCAMPUS: (17, 53, 18, 54),
    Tissue.VENTRAL_DIENCEPHALON: (28, 60),
    Tissue.CHOROID_PLEXUS: (31, 63, 136, 137, 163, 164),
}
CSF_CLASSES = (Tissue.CSF, Tissue.VENTRICLE)


@dataclass
class ParameterMaps:
    """NMR parameters on a 1 mm grid; each a tensor (z, y, x)."""

    proton_density: Tensor
    t1_ms: Tensor
    t2_ms: Tensor
    adc: Tensor  # 1e-3 mm^2/s


def parameter_maps(classes: Tensor, draw: Draw) -> ParameterMaps:
    """NMR parameters of one person: the table, this person's deviations from it, and texture within tissues.

    Args:
        classes: integer tensor (z, y, x) of `Tissue` values on a 1 mm grid.
    """
    shared_t2, shared_adc = draw.normal(0, 0.06), draw.normal(0, 0.04)
    rows = []
    for tissue in Tissue:
        p = TISSUES[tissue]
        t2 = p.t2_ms * draw.lognormal(1.0, p.t2_spread) * (1 + shared_t2)
        adc = p.adc * draw.lognormal(1.0, p.adc_spread) * (1 if tissue in CSF_CLASSES else 1 + shared_adc)
        rows.append([p.proton_density, p.t1_ms, t2, adc])
    table = torch.tensor(rows, device=classes.device)
    density, t1, t2_map, adc_map = (table[:, i][classes] for i in range(4))
    texture = draw.field(classes.shape, 9.0, 2)
    fine = draw.field(classes.shape, 2.5, 1)[0]
    t2_map = t2_map * (1 + 0.03 * texture[0] + 0.025 * fine)
    adc_map = adc_map * (1 + 0.03 * texture[1] + 0.03 * fine)
    return ParameterMaps(density, t1, t2_map, adc_map)
