"""Volumes of one acquisition: what is averaged shows the same head with the same weighting, and is what its b-values say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, rotate

from conftest import phantom_arrays, write_image
from ensemble.errors import InputRefused
from ensemble.readers.b_values import select_dwi
from ensemble.readers.imagefile import read_image
from ensemble.types import AnyArray, Modality

PATH = Path("dwi.nii.gz")


@cache
def head(b: float = 1000.0, noise: float = 0.05, count: int = 3, seed: int = 0) -> dict[str, AnyArray]:
    """b0, directions (count, z, y, x), and ADC (1e-6 mm^2/s) of a head with CSF, two kinds of tissue, tracts of any direction, and air.

    Diffusion along tracts 1.7e-3, across 0.3e-3 mm^2/s (Pierpaoli et al., Radiology 1996); noise as a share of tissue's signal.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 64, 56)], indexing="ij")
    radius = np.sqrt((x / 0.68) ** 2 + (y / 0.9) ** 2 + (z / 1.1) ** 2)
    csf = ((np.abs(np.abs(x) - 0.18) < 0.1) & (np.abs(y + 0.25) < 0.3) & (np.abs(z) < 0.5)) | (
        (radius > 0.92) & (radius < 1)
    )
    white = (radius < 0.7) & ~csf
    axes = np.stack([gaussian_filter(rng.standard_normal(x.shape), 5) for _ in range(3)])
    axes /= np.linalg.norm(axes, axis=0)
    along = np.where(white & (gaussian_filter(rng.standard_normal(x.shape), 4) > 0), 1.4, 0.0)
    mean = np.where(csf, 3.0, np.where(white, 0.72, 0.85))
    proton = np.where(radius < 1, np.where(csf, 2.2, np.where(white, 0.85, 1.1)), 0) * 800

    def measured(signal: AnyArray) -> AnyArray:
        sigma = noise * 800 * np.exp(-0.8e-3 * b)
        return np.hypot(*(sigma * rng.standard_normal((2, *x.shape)) + np.stack([signal, 0 * signal]))).astype(
            np.float32
        )

    pointing = np.linalg.qr(rng.standard_normal((3, 3)))[0] if count == 3 else rng.standard_normal((count, 3))
    pointing /= np.linalg.norm(pointing, axis=1, keepdims=True)
    diffusion = [mean + along * (np.tensordot(way, axes, 1) ** 2 - 1 / 3) for way in pointing]
    return {
        "b0": measured(proton),
        "directions": np.stack([measured(proton * np.exp(-b * 1e-3 * each)) for each in diffusion]),
        "adc": np.where(radius < 1, 1000 * mean, 0).astype(np.float32),
    }


def chosen(volumes: list[AnyArray], b_values: list[float]) -> tuple[AnyArray, str]:
    return select_dwi(np.stack(volumes), b_values, PATH, "dwi.bval")


@pytest.mark.slow
@pytest.mark.parametrize("b", [700.0, 1000.0, 2000.0])
@pytest.mark.parametrize("noise", [0.02, 0.25])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_directions_of_one_shell_are_averaged(b: float, noise: float, count: int) -> None:
    for seed in range(2):
        images = head(b, noise, count, seed)
        mean, note = chosen([images["b0"], *images["directions"]], [0, *np.linspace(b - 25, b + 25, count)])
        assert f"geometric mean of {count} of {count + 1}" in note
        assert np.allclose(mean, np.exp(np.log(np.maximum(images["directions"], 1e-6)).mean(0)), rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 0.4])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("b", [1000.0, 2000.0])
def test_an_adc_is_not_averaged_with_its_trace(scale: float, directions: int, b: float) -> None:
    images = head(b)
    shell = [*images["directions"][:directions], images["adc"] * scale]
    with pytest.raises(InputRefused, match="volumes of one b-value differ too much") as refusal:
        chosen([images["b0"], *shell], [0, *[b] * len(shell)])
    assert f"{directions + 2} (b = {b:g})" in refusal.value.found
    assert "dwi.bval" in refusal.value.do


def test_an_adc_of_the_phantom_is_not_averaged_with_its_trace(tmp_path: Path) -> None:
    """As in the issue: [b0, trace, ADC] with the b-values 0 1000 1000, from a file."""
    arrays = phantom_arrays()
    trace, adc = arrays[Modality.DWI], arrays[Modality.ADC]
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([trace * 2, trace, adc]), isVector=False), str(tmp_path / PATH))
    (tmp_path / "dwi.bval").write_text("0 1000 1000\n")
    with pytest.raises(InputRefused, match="differ too much"):
        read_image(tmp_path / PATH, Modality.DWI)


SPOILT = {
    "a b0": lambda i: i["b0"],
    "another unit": lambda i: i["directions"][0] * 1000,
    "a tenth": lambda i: i["directions"][0] / 10,
    "shifted": lambda i: np.roll(i["directions"][0], 6, 2),
    "shifted along": lambda i: np.roll(i["directions"][0], 6, 1),
    "turned": lambda i: rotate(i["directions"][0], 25, (1, 2), reshape=False, order=1),
    "upside down": lambda i: i["directions"][0][:, ::-1],
    "slices lost": lambda i: i["directions"][0] * (np.arange(20) % 4 != 0)[:, None, None],
    "slices darkened": lambda i: i["directions"][0] * np.where(np.arange(20) % 4 == 0, 0.15, 1)[:, None, None],
    "noise": lambda i: np.abs(np.random.default_rng(0).normal(size=i["b0"].shape)) * 300,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("good", [1, 2, 5])
def test_a_volume_that_shows_something_else_is_named(fault: str, good: int) -> None:
    images = head(count=6)
    odd = SPOILT[fault](images)
    shell = [*images["directions"][6 - good :], odd]
    with pytest.raises(InputRefused, match="differ too much") as refusal:
        chosen([images["b0"], *shell], [0, *[1000] * len(shell)])
    assert f"{good + 2} (b = 1000) of {good + 2}" in refusal.value.found


def test_a_head_that_moved_by_a_voxel_is_still_one() -> None:
    images = head()
    moved = [np.roll(each, k - 1, 2) for k, each in enumerate(images["directions"])]
    chosen([images["b0"], *moved], [0, 1000, 1000, 1000])


@pytest.mark.parametrize("empty", [0.0, 7.0, np.nan])
@pytest.mark.parametrize("shell", [1, 3])
def test_an_empty_volume_is_named(empty: float, shell: int) -> None:
    images = head()
    volumes = [images["b0"], *images["directions"][:shell]]
    volumes[shell] = np.full_like(volumes[0], empty)
    with pytest.raises(InputRefused, match="a volume of the DWI is empty") as refusal:
        chosen(volumes, [0, *[1000] * shell])
    assert f"volume {shell + 1} (b = 1000) of {shell + 1}" in refusal.value.found


@pytest.mark.parametrize("sign", ["negative", "negative but for a voxel"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_negative_volume_is_named(sign: str, at: int) -> None:
    """It ended in a traceback."""
    images = head()
    volumes = [images["b0"], *images["directions"]]
    volumes[at] = -volumes[at] - 1
    volumes[at][5, 5, 5] *= -1 if "voxel" in sign else 1
    if at == 0 and sign == "negative":
        chosen(volumes, [0, 1000, 1000, 1000])  # nobody needs a b0
        return
    with pytest.raises(InputRefused) as refusal:
        chosen(volumes, [0, 1000, 1000, 1000])
    assert f"volume {at + 1} (b" in refusal.value.found


def test_a_shell_of_which_half_shows_something_else_is_refused() -> None:
    """The median of such a shell lies between: none of its volumes is far from it."""
    images = head(count=4)
    one, two, three, _ = images["directions"]
    for odd in (images["b0"], images["adc"], one * 2.4, one / 2.4):
        for shell in ([one, two, odd, odd], [one, two, odd, odd * 1.02], [odd, odd, odd, one, two, three]):
            with pytest.raises(InputRefused, match="differ too much"):
                chosen([images["b0"] * 3, *shell], [0, *[1000] * len(shell)])


@pytest.mark.parametrize("true", [(0, 1000, 500), (0, 2000, 1000), (500, 0), (300, 0), (0, 700, 1000, 300)])
def test_shells_in_another_order_than_their_b_values_are_refused(true: tuple[int, ...]) -> None:
    """Ascending b-values stand beside volumes of b `true`: only the lowest was looked at, and only if it was below 250."""
    volumes = {b: head(float(b))["directions"][0] if b else head()["b0"] for b in true}
    ascending: list[float] = sorted(true) if len(true) > 2 else [500, 1000]
    with pytest.raises(InputRefused, match="in a different order"):
        chosen([volumes[b] for b in true], ascending)
    chosen([volumes[b] for b in sorted(true)], ascending)


@pytest.mark.parametrize("noise", [0.02, 0.25])
def test_shells_in_order_are_read(noise: float) -> None:
    shells = (50, 300, 700, 1000, 1400, 2000, 3000)
    volumes = [head()["b0"], *(head(float(b), noise)["directions"][0] for b in shells)]
    for last in range(4, len(volumes) + 1):
        chosen(volumes[:last], [0, *shells[: last - 1]])


def test_volumes_in_another_order_than_their_b_values_are_refused() -> None:
    images = head()
    trace = images["directions"][0]
    for volumes, b_values in (([trace, images["b0"]], [0, 1000]), ([images["b0"], trace, trace], [1000, 0, 0])):
        with pytest.raises(InputRefused, match="in a different order"):
            chosen(volumes, b_values)
    with pytest.raises(InputRefused, match="in a different order"):
        chosen([images["b0"], images["b0"]], [0, 1000])
    chosen([images["b0"], trace], [0, 1000])
    chosen([trace, images["b0"]], [1000, 0])
    chosen([images["b0"] * 0, trace], [0, 1000])


def test_a_volume_that_stands_there_twice_is_noted() -> None:
    images = head()
    one, two = images["directions"][:2]
    assert chosen([images["b0"], one, two, one], [0, 1000, 1000, 1000])[1].endswith("1 of them stand there twice")
    assert "twice" not in chosen([images["b0"], one, two], [0, 1000, 1000])[1]


def test_a_pair_whose_second_is_a_map_of_another_unit_is_refused() -> None:
    images = head()
    trace, adc = images["directions"][0], images["adc"]
    for scale in (1e-6, 1e-3, 10):
        with pytest.raises(InputRefused, match="is not diffusion-weighted"):
            select_dwi(np.stack([trace, adc * scale]), None, PATH)


DWI = phantom_arrays()[Modality.DWI]


@pytest.mark.parametrize(
    ("b_values", "message"),
    [
        ("0", "no volume with a b-value used for stroke"),
        ("2500", "no volume with a b-value used for stroke"),
        ("1.0", "no volume with a b-value used for stroke"),
        ("0 1000", "not valid"),
        ("", "not valid"),
        ("nan", "not valid"),
        ("-1000", "not valid"),
        ("1e9", "not valid"),
        ("inf", "not valid"),
        ("b1000", "not valid"),
    ],
)
@pytest.mark.parametrize("axes", [3, 4])
def test_b_values_beside_a_file_of_one_volume_count(tmp_path: Path, b_values: str, message: str, axes: int) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(DWI if axes == 3 else DWI[None], isVector=False), str(tmp_path / PATH))
    (tmp_path / "dwi.bval").write_text(b_values + "\n")
    with pytest.raises(InputRefused, match=message) as refusal:
        read_image(tmp_path / PATH, Modality.DWI)
    assert "s/mm^2" in refusal.value.do
    read_image(tmp_path / PATH, Modality.ADC)  # of other images they say nothing
    for good in ("1000", "1000.0\n", "\t1005 \n", "800"):
        (tmp_path / "dwi.bval").write_text(good)
        image = read_image(tmp_path / PATH, Modality.DWI)
        assert np.array_equal(image.volume.array, DWI)
        assert "volume 1 of 1" in image.notes[-1]


@pytest.mark.parametrize("text", ["0 1000 1000", "0\n1000\n1000\n", " 0\t1000 \r\n 1000"])
def test_b_values_may_stand_in_a_line_or_a_column(tmp_path: Path, text: str) -> None:
    images = head()
    write_image(DWI, tmp_path / "x.nii.gz")
    volumes = np.stack([images["b0"], *images["directions"][:2]])
    sitk.WriteImage(sitk.GetImageFromArray(volumes, isVector=False), str(tmp_path / PATH))
    (tmp_path / "dwi.bval").write_text(text)
    assert "geometric mean of 2 of 3" in read_image(tmp_path / PATH, Modality.DWI).notes[0]
    (tmp_path / "dwi.bval").write_text("0 1 1")
    with pytest.raises(InputRefused, match="b-value used for stroke") as refusal:
        read_image(tmp_path / PATH, Modality.DWI)
    assert "ms/um^2" in refusal.value.do
