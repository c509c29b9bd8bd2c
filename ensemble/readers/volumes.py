"""Which of several volumes of one acquisition is the diffusion-weighted image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.types import AnyArray

#: b-values in s/mm^2: what a stroke protocol calls diffusion-weighted, what it aims at, and how far values of one shell differ.
DIFFUSION_B, USUAL_B, SAME_SHELL = (500.0, 2000.0), 1000.0, 60.0
#: How often the mean signal of one direction may hold that of another: directions of one shell hardly differ over a whole brain; b = 0
#: to 1000 takes half of its signal and more (exp(-0.8)), and maps have other units.
_UNLIKE = 1.5


def diffusion_weighted(
    volumes: AnyArray, b_values: Sequence[float] | None, path: Path, b_file: str = ""
) -> tuple[AnyArray, str]:
    """The diffusion-weighted image among volumes (n, z, y, x), and a sentence on how it was chosen.

    With b-values (s/mm^2), it is the shell nearest to 1000; its directions are averaged geometrically, which gives the trace image.
    Without, only a pair of b0 and b1000, in this order, can be told. `b_file` is where b-values would be read from, if anywhere.

    Raises InputRefused when none can be chosen safely.
    """
    if b_values is None:
        return _second_of_two(volumes, path, b_file)
    usable = [b for b in b_values if DIFFUSION_B[0] <= b <= DIFFUSION_B[1]]
    if not usable:
        raise InputRefused(
            "no volume of the DWI series is diffusion-weighted as stroke protocols do it",
            where=path,
            found=f"b-values {_listed(b_values)} s/mm^2",
            do=f"give one with b between {DIFFUSION_B[0]:.0f} and {DIFFUSION_B[1]:.0f} s/mm^2",
        )
    b = min(usable, key=lambda value: (abs(value - USUAL_B), value))
    shell = [number for number, value in enumerate(b_values) if abs(value - b) <= SAME_SHELL]
    if len(shell) == 1:
        return volumes[shell[0]], f"DWI: volume {shell[0] + 1} of {len(volumes)}, b = {b:g} s/mm^2"
    directions = np.asarray(volumes, np.float32)[shell]
    signals = [float(np.nanmean(np.abs(volume), dtype=np.float64)) for volume in directions]
    trace = np.exp(np.log(np.maximum(directions, np.float32(1e-6))).mean(axis=0))
    trace[(directions <= 0).any(axis=0)] = 0
    trace[~np.isfinite(directions).all(axis=0)] = np.nan  # what is no number in tissue refuses the case, later
    note = f"DWI: geometric mean of {len(shell)} of {len(volumes)} volumes, those of b = {b:g} s/mm^2"
    if max(signals) > _UNLIKE * min(signals):
        note += f"; mean signals of {min(signals):.4g} to {max(signals):.4g}: see that all of them are directions of one image"
    return trace, note


def _second_of_two(volumes: AnyArray, path: Path, b_file: str) -> tuple[AnyArray, str]:
    alone = "give the volume of b about 1000 s/mm^2 alone"
    do = f"lay {b_file} beside it, or {alone}" if b_file else alone
    if len(volumes) != 2:
        raise InputRefused(
            "it can't be told which volume of the DWI file is diffusion-weighted",
            where=path,
            found=f"{len(volumes)} volumes, and no b-values",
            do=do,
        )
    first, second = (float(np.nanmean(np.abs(volume), dtype=np.float64)) for volume in volumes)
    if not second < first:
        raise InputRefused(
            "the DWI file holds two volumes, of which the second is no diffusion-weighted one",
            where=path,
            found=f"mean signal {first:.4g}, then {second:.4g}; diffusion weighting takes signal away",
            do=do,
        )
    return volumes[1], "DWI: the last of two volumes (no b-values; the first is brighter, as a b0 is)"


def _listed(b_values: Sequence[float]) -> str:
    return ", ".join(f"{b:g}" for b in sorted(set(b_values)))
