"""Choose the diffusion-weighted image among the volumes of one acquisition, and check the volumes against their b-values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.readers.base import LowBImage
from ensemble.types import AnyArray, FloatArray

#: b-values in s/mm^2: range and usual value of a stroke protocol, and largest difference within one shell.
DIFFUSION_B, USUAL_B, SAME_SHELL = (500.0, 2000.0), 1000.0, 60.0

#: Highest b-value of an unweighted volume for computing ADC, and largest difference between such volumes of one acquisition.
LOW_B, _SAME_LOW = 100.0, 20.0
#: Signals below this share of the brightest are air, noise or CSF, and are not used.
_DARK, _FLOOR = 0.2, 0.02
#: Largest difference of diffusivity (1e-3 mm^2/s) between two directions: in the median of a head, so that an unweighted volume (0.8 in
#: tissue) always exceeds it; and in a voxel with a similar neighbour, except in this share of voxels.
_MEDIAN_DIFFERENCE, _VOXEL_DIFFERENCE, _ODD_SHARE = 0.75, 0.8, 0.05
#: Minimum rank correlation of two volumes, and of one with the median of several. ADC and trace have at most -0.19 and 0.01 on simulated
#: heads, where directions have at least 0.02 and 0.53 (b 1000 and 2000, signal to noise 4 and 20, with and without air).
_MIN_ALIKE, _MIN_ALIKE_MEDIAN = -0.1, 0.1
#: How far (1e-3 mm^2/s) a low-b volume may seem more weighted than the weighted one; and by which factor the latter may be darker.
_MAX_REVERSED, _MAX_TIMES_DARKER = 0.1, 50.0
#: Difference (s/mm^2) from which on the b-values of two shells determine which volume is brighter.
_OTHER_SHELL = 250.0


def select_dwi(
    volumes: AnyArray, b_values: Sequence[float] | None, path: Path, b_file: str = ""
) -> tuple[AnyArray, str]:
    """Return the diffusion-weighted image among volumes (n, z, y, x), and a sentence on how it was chosen.

    With b-values (s/mm^2), it is the shell nearest to 1000; its directions are averaged geometrically, which gives the trace image.
    Without, only a pair of b0 and b1000, in this order, can be told. `b_file` is where b-values would be read from, if anywhere.

    Raises InputRefused when none can be chosen safely: also when a volume of the shell is empty or does not agree with the others, or is
    not darker than one of lower b.
    """
    if b_values is None:
        return _second_of_two(volumes, path, b_file)
    usable = [b for b in b_values if DIFFUSION_B[0] <= b <= DIFFUSION_B[1]]
    if not usable:
        unit = " in s/mm^2 (1 ms/um^2 is 1000 of them)" if 0 < max(b_values, default=0) <= 10 else " s/mm^2"
        raise InputRefused(
            "the DWI series has no volume with a b-value used for stroke",
            where=path,
            found=f"b-values {_listed(b_values)} s/mm^2",
            do=f"give one with b between {DIFFUSION_B[0]:.0f} and {DIFFUSION_B[1]:.0f}{unit}",
        )
    b, shell = _shell(b_values, usable)
    refuse = _Refusal(path, b_values, f"correct {b_file}" if b_file else "correct the b-values")
    if empty := [number for number in shell if _is_empty(volumes[number])]:
        raise refuse("a volume of the DWI is empty", empty, "all voxels have the same value")
    if len(shell) > 1 and (none := [number for number in shell if not (volumes[number] > 0).any()]):
        raise refuse("a volume of the DWI has no signal", none, "no voxel is positive")
    if len(shell) > 1:
        _refuse_at_odds(np.asarray(volumes)[shell], shell, b, refuse)
    weighted = volumes[shell[0]] if len(shell) == 1 else _geometric_mean(np.asarray(volumes, np.float32)[shell])
    for number, value in enumerate(b_values):
        if abs(value - b) > _OTHER_SHELL and not _is_empty(volumes[number]) and (volumes[number] > 0).any():
            _refuse_reversed(weighted, volumes[number], b - value, number, refuse)
    if len(shell) == 1:
        return weighted, f"DWI: volume {shell[0] + 1} of {len(volumes)}, b = {b:g} s/mm^2"
    note = f"DWI: geometric mean of {len(shell)} of {len(volumes)} volumes, those of b = {b:g} s/mm^2"
    twice = [
        n for n, at in enumerate(shell) if any(np.array_equal(volumes[at], volumes[before]) for before in shell[:n])
    ]
    return weighted, note + f"; {len(twice)} of them stand there twice" * bool(twice)


def weighted_volume_indices(count: int, b_values: Sequence[float] | None) -> list[int]:
    """Return the indices of the volumes, out of `count`, that `select_dwi` makes its image from."""
    if b_values is None:
        return [count - 1]
    return _shell(b_values, [b for b in b_values if DIFFUSION_B[0] <= b <= DIFFUSION_B[1]])[1]


def _shell(b_values: Sequence[float], usable: Sequence[float]) -> tuple[float, list[int]]:
    """Return the usable b-value nearest to 1000, and the volumes of its shell."""
    b = min(usable, key=lambda value: (abs(value - USUAL_B), value))
    return b, [number for number, value in enumerate(b_values) if abs(value - b) <= SAME_SHELL]


def select_low_b(volumes: AnyArray, b_values: Sequence[float] | None, path: Path) -> LowBImage:
    """Return the mean of the volumes (n, z, y, x) of lowest b-value, to go with the image that `select_dwi` chose.

    Raises InputRefused if there is none, or if they differ too much.
    """
    if b_values is None:
        alone = (
            "it holds one volume" if len(volumes) == 1 else f"the b-values of its {len(volumes)} volumes are not known"
        )
        raise missing_adc_error(path, alone)
    usable = [b for b in b_values if DIFFUSION_B[0] <= b <= DIFFUSION_B[1]]
    _, shell = _shell(b_values, usable)
    lowest = min(b_values)
    if lowest > LOW_B:
        held = "it holds one volume" if len(volumes) == 1 else "it holds no volume of b = 0"
        raise missing_adc_error(path, f"{held}; b = {_listed(b_values)} s/mm^2")
    low = [number for number, value in enumerate(b_values) if value - lowest <= _SAME_LOW]
    refuse = _Refusal(path, b_values, "correct the b-values")
    if empty := [number for number in low if _is_empty(volumes[number])]:
        raise refuse("a volume of the DWI is empty", empty, "all voxels have the same value")
    if len(low) > 1:
        _refuse_at_odds(np.asarray(volumes)[low], low, USUAL_B, refuse)
    array = np.asarray(volumes, np.float32)[low].mean(axis=0)
    return LowBImage(array, *(float(np.mean([b_values[number] for number in numbers])) for numbers in (low, shell)))


def missing_adc_error(path: Path, found: str) -> InputRefused:
    """Return the error for a case in which no ADC map is given and none can be computed."""
    return InputRefused(
        "there is no ADC image",
        where=path,
        found=f"it can't be computed from the DWI: {found}",
        do="give the ADC map (--adc; images/adc-brain-mri in the contract), or a DWI with b0, b about 1000 s/mm^2 and its"
        " b-values: an image file with its .bval, or a DICOM series",
    )


class _Refusal:
    """Makes the errors about volumes of one file."""

    def __init__(self, path: Path, b_values: Sequence[float], correct: str) -> None:
        self._path, self._b_values, self._correct = path, b_values, correct

    def __call__(self, what: str, numbers: Sequence[int], found: str) -> InputRefused:
        named = " and ".join(f"{n + 1} (b = {self._b_values[n]:g})" for n in numbers)
        return InputRefused(
            what,
            where=self._path,
            found=f"volume{'s' * (len(numbers) > 1)} {named} of {len(self._b_values)}: {found}",
            do=f"remove the volumes that do not belong there, or {self._correct}, or give only the volume of b about 1000 s/mm^2",
        )


def _is_empty(volume: AnyArray) -> bool:
    finite = volume[np.isfinite(volume)]
    return finite.size == 0 or bool(finite.min() == finite.max())


def _geometric_mean(directions: FloatArray) -> FloatArray:
    trace: FloatArray = np.exp(np.log(np.maximum(directions, np.float32(1e-6))).mean(axis=0))
    trace[(directions <= 0).any(axis=0)] = 0
    trace[~np.isfinite(directions).all(axis=0)] = np.nan  # NaN in tissue is refused later
    return trace


def _refuse_at_odds(volumes: AnyArray, numbers: Sequence[int], b: float, refuse: _Refusal) -> None:
    """Raise InputRefused unless all volumes of a shell show the same head with the same diffusion weighting.

    Signals of two directions differ by exp(-b (D1 - D2)): by little in the median of a head, by more in tracts only, and what is bright or
    dark in one is so in the others (CSF is dark in all). Each volume is compared with the median of all; of two, with the other.
    """
    logs = np.stack([_log_signal(volume) for volume in volumes])
    others = logs[::-1] if len(logs) == 2 else np.broadcast_to(np.median(logs, axis=0), logs.shape)
    least = _MIN_ALIKE if len(logs) == 2 else _MIN_ALIKE_MEDIAN
    worst: tuple[float, int, str] | None = None
    levels: list[float] = []
    for number, log, other in zip(numbers, logs, others, strict=True):
        level, alike, odd = _agreement(log, other, _VOXEL_DIFFERENCE * b / 1000)
        levels.append(level)
        for badness, found in (
            (abs(level) / (_MEDIAN_DIFFERENCE * b / 1000), f"{np.exp(level):.3g} times the signal of the others"),
            (1 + least - alike, f"its contrast differs from the others' (rank correlation {alike:.2f})"),
            (odd / _ODD_SHARE, f"in {odd:.0%} of the head differs from the others (motion or signal loss?)"),
        ):
            if badness > 1 and (worst is None or badness > worst[0]):
                worst = badness, number, found
    if worst is None and len(logs) > 2:
        _refuse_two_halves(levels, numbers, b, refuse)
    if worst is not None:
        named = numbers if len(numbers) == 2 else [worst[1]]
        raise refuse("volumes of one b-value differ too much", named, worst[2])


def _refuse_two_halves(levels: Sequence[float], numbers: Sequence[int], b: float, refuse: _Refusal) -> None:
    """Raise InputRefused if half of a shell's volumes are much brighter than the rest, which the median of all would hide."""
    order = np.argsort(levels)
    steps = np.diff(np.take(levels, order))
    if (step := float(steps.max())) > _MEDIAN_DIFFERENCE * b / 1000:
        at = int(steps.argmax())
        found = f"{np.exp(step):.3g} times the signal of the other"
        raise refuse("volumes of one b-value differ too much", [numbers[order[at + 1]], numbers[order[at]]], found)


def _refuse_reversed(weighted: AnyArray, other: AnyArray, difference: float, number: int, refuse: _Refusal) -> None:
    """Raise InputRefused if the weighted volume is clearly brighter than one whose b-value is lower by `difference`, or the same, or
    clearly darker than one of a higher b-value.

    Volumes that are only alike pass: a few slices at the end of a head hold little tissue (a public GE series: 1.01), and a b0 in the place
    of the DWI is told from the whole image later.
    """
    level = _agreement(_log_signal(weighted), _log_signal(other), np.inf)[0]
    if not level * np.sign(difference) <= _MAX_REVERSED * abs(difference) / 1000 or np.array_equal(weighted, other):
        than = f"a volume of {'low' if difference > 0 else 'high'} b-value is no {'brighter' if difference > 0 else 'darker'}"
        raise refuse(
            f"{than} than the diffusion-weighted one: are volumes or b-values in a different order?",
            [number],
            f"{np.exp(-level):.3g} times the signal, although diffusion weighting reduces it",
        )


def _log_signal(volume: AnyArray) -> FloatArray:
    """Return the log signal (z, y, x), smoothed within slices, with a floor far below tissue."""
    from scipy.ndimage import uniform_filter

    finite = np.nan_to_num(np.asarray(volume, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    smooth = uniform_filter(finite, (0, 3, 3))
    floor = np.float32(max(_FLOOR * _bright(smooth), float(np.finfo(np.float32).tiny)))
    logarithm: FloatArray = np.log(np.maximum(smooth, floor))
    return logarithm


def _bright(volume: FloatArray) -> float:
    signal = volume[volume > 0]
    return float(np.percentile(signal, 95)) if signal.size else 0.0


def _bright_log(log: FloatArray) -> float:
    """Return the log signal above which voxels belong to the bright part of a head; infinite if nothing exceeds the floor."""
    signal = log[log > log.min()]
    return float(np.percentile(signal, 95) + np.log(_DARK)) if signal.size else float("inf")


def _agreement(log: FloatArray, other: FloatArray, limit: float) -> tuple[float, float, float]:
    """Return how well two volumes agree (both as log signal): the median difference where both have signal.

    Rank correlation there; and the share of voxels in either's foreground that differ from all neighbours in the other by more than `limit`
    beside that.
    """
    from scipy.ndimage import maximum_filter, minimum_filter
    from scipy.stats import rankdata

    step = 2 if min(log.shape[1:]) >= 96 else 1
    thin = (slice(None), slice(None, None, step), slice(None, None, step))
    here, there = log[thin], other[thin]
    bright = [values > _bright_log(values) for values in (here, there)]
    both, either = bright[0] & bright[1], bright[0] | bright[1]
    if not both.any():
        return (
            float(_bright_log(here) - _bright_log(there)) if all(each.any() for each in bright) else np.inf,
            -1.0,
            1.0,
        )
    level = float(np.median(here[both] - there[both]))
    ranks = [rankdata(values[both]) for values in (here, there)]
    alike = 1.0 if min(map(np.ptp, ranks)) == 0 else float(np.corrcoef(*ranks)[0, 1])
    above, below = here - maximum_filter(other, 3)[thin] - level, minimum_filter(other, 3)[thin] - here + level
    return level, alike, float((np.maximum(above, below)[either] > limit).mean())


def _second_of_two(volumes: AnyArray, path: Path, b_file: str) -> tuple[AnyArray, str]:
    alone = "give only the volume of b about 1000 s/mm^2"
    do = f"lay {b_file} beside it, or {alone}" if b_file else alone
    if len(volumes) != 2:
        raise InputRefused(
            "the DWI file does not say which of its volumes is diffusion-weighted",
            where=path,
            found=f"{len(volumes)} volumes, and no b-values",
            do=do,
        )
    first, second = (float(np.nanmean(np.abs(volume), dtype=np.float64)) for volume in volumes)
    if not first / _MAX_TIMES_DARKER < second < first:
        raise InputRefused(
            "the second of the two volumes in the DWI file is not diffusion-weighted",
            where=path,
            found=f"mean signal {first:.4g}, then {second:.4g}; diffusion weighting reduces the signal, but not almost to zero",
            do=do,
        )
    return volumes[1], "DWI: the last of two volumes (no b-values; the first is brighter, as a b0 is)"


def _listed(b_values: Sequence[float]) -> str:
    return ", ".join(f"{b:g}" for b in sorted(set(b_values)))
