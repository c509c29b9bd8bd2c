"""A folder or .zip of DICOM files -> RawImage: the one series that shows the modality, its slices in order, none missing.

GDCM (through SimpleITK) reads tags and pixels; order, spacing and completeness are checked here, since a series reader stacks whatever
it finds. Attributes: DICOM PS3.3 C.7.6.2 (image plane), C.8.13.5.9 (diffusion); vendors' b-values as their conformance statements say.
"""

from __future__ import annotations

import math
import re
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zlib import error as ZlibError

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.readers.base import RawImage
from ensemble.readers.names import ARCHIVE, SLICE_SUFFIXES
from ensemble.readers.native import MOST_VOXELS, SKEW, last_line, straightened
from ensemble.readers.volumes import DIFFUSION_B, diffusion_weighted
from ensemble.streams import native_stderr_to_log, printable
from ensemble.types import AnyArray, FloatArray, Modality
from ensemble.volume import Volume

#: Of one examination; more is an archive of patients, not a case.
MOST_FILES, MOST_UNPACKED_BYTES = 20_000, 4 << 30
#: How far slices may lie from even spacing, as a share of it, and from the line at right angles to the first one, in mm; of a high
#: stack `SKEW` of its height, since cosines of three digits do not tell that line more exactly.
_UNEVEN, _ASIDE_MM = 0.02, 0.1

_CONVERT = "convert it with dcm2niix and give the .nii.gz"
#: What series descriptions call the modalities, in lower case.
_WORDS = {
    Modality.ADC: re.compile(r"(?<![a-z])adc(?![a-z])|apparent"),
    Modality.FLAIR: re.compile(r"flair|tirm|dark.?fl"),
    Modality.DWI: re.compile(r"dwi|diff|trace|(?<![a-z])b ?=? ?1000"),
}
#: Maps made of diffusion images that are neither DWI nor ADC.
_OTHER_MAPS = re.compile(r"e-?adc|exp|(?<![a-z])(fa|colfa|tensor)(?![a-z])")
_TRACE = re.compile(r"trace")
#: Where b-values stand: the standard, then Siemens, GE (millions added), Philips, United Imaging.
_B_VALUE_TAGS = ("0018|9087", "0019|100c", "0043|1039", "2001|1003", "0065|1009")
_SEQUENCE_B = re.compile(r"b(\d+)")
_PIXEL_DATA, _SEQUENCE_END = b"\xe0\x7f\x10\x00", b"\xfe\xff\xdd\xe0"
#: Kinds of objects that hold no image (SOP classes of PS3.4 B.5): reports, presentation states, raw data, waveforms, documents.
_NO_IMAGE = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(88|11|66|9|104)\b")


@dataclass(frozen=True)
class _Slice:
    """One file: what its tags say."""

    path: Path
    series: str
    description: str
    kind: str
    """ImageType, in capitals."""
    number: int
    """Instance number."""
    b: float | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    """Between rows, between columns (mm)."""
    size: tuple[int, int]
    """Columns, rows."""


def is_dicom(path: Path) -> bool:
    """Whether a path is read as DICOM: a folder or a .zip."""
    return path.suffix.lower() == ARCHIVE or _is_folder(path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # a name too long, or a folder that may not be searched: opening it will say so


def read_dicom(path: Path, modality: Modality) -> RawImage:
    """Read the series of a folder (subfolders included) or .zip that shows a modality, as float32.

    Raises InputRefused when there is none or more than one, when slices are missing, damaged or of different sizes, or when the files
    are of a kind that is not read (multi-frame, mosaic, colour).
    """
    label = modality.value.upper()
    with _files(path, label) as files, native_stderr_to_log():
        slices = [found for file in files if (found := _read_tags(file, path, label)) is not None]
        if not slices:
            raise InputRefused(
                f"there are no DICOM images for {label}",
                where=path,
                do="give an image file, or a folder or .zip of DICOM",
            )
        chosen, notes = _choose(slices, modality, path)
        volumes, b_values, grid = _stack(chosen, path, label)
    if len(volumes) == 1:
        array = volumes[0]
    elif modality is Modality.DWI:
        array, note = diffusion_weighted(volumes, b_values, path)
        notes.append(note)
    else:
        raise InputRefused(
            f"the {label} series holds several images of each slice",
            where=path,
            found=f"{len(volumes)} images at each of {volumes.shape[1]} places in {_title(chosen)}",
            do="give a series of one volume",
        )
    grid = straightened(grid, path, label, notes)
    return RawImage(path, Volume(array.astype(np.float32), grid), tuple(notes))


def shown_in(folder: Path) -> frozenset[Modality]:
    """The modalities of which a folder (subfolders included) holds DICOM series; empty where there is no DICOM.

    Raises InputRefused for files that are DICOM but damaged, or of a kind that is not read.
    """
    with native_stderr_to_log():
        files = _listing(folder, folder, "DICOM")
        slices = [found for file in files if (found := _read_tags(file, folder, "DICOM")) is not None]
    return frozenset(modality for modality in Modality if any(_shows(each, modality) for each in _by_series(slices)))


@contextmanager
def _files(path: Path, label: str) -> Iterator[list[Path]]:
    """All files of a folder; or of an archive, unpacked for as long as the block lasts."""
    if _is_folder(path):
        yield _listing(path, path, label)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) > MOST_FILES or sum(m.file_size for m in members) > MOST_UNPACKED_BYTES:
                    raise InputRefused(
                        f"the {label} archive is too large for one examination",
                        where=path,
                        found=f"{len(members)} files, {sum(m.file_size for m in members) / 1e9:.1f} GB unpacked",
                        do="pack the series of this case alone",
                    )
                archive.extractall(folder, members)
        except FileNotFoundError as error:
            raise InputRefused(f"the {label} image does not exist", where=path, do="check the path") from error
        except (
            zipfile.BadZipFile,
            ZlibError,
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
            ValueError,
        ) as error:
            raise InputRefused(
                f"the {label} archive is damaged, or can't be unpacked",
                where=path,
                found=str(error) or type(error).__name__,
                do="copy it again, or unpack it and give the folder",
            ) from error
        yield _listing(Path(folder), path, label)


def _listing(folder: Path, path: Path, label: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name.upper() != "DICOMDIR"
    ]
    if len(files) > MOST_FILES:
        raise InputRefused(
            f"the {label} folder holds too many files for one examination",
            where=path,
            found=f"{len(files)} files",
            do="give the folder of this case's series",
        )
    return files


def _read_tags(file: Path, path: Path, label: str) -> _Slice | None:
    """What a file's tags say; None for a file that is no DICOM image. Raises InputRefused for one that is, but is damaged or not read."""

    def refuse(what: str, found: str, do: str) -> InputRefused:
        return InputRefused(f"a file of the {label} series {what}", where=_inside(file, path), found=found, do=do)

    try:
        with file.open("rb") as stream:
            begin = stream.read(132)
            if begin[128:] != b"DICM" and file.suffix.lower() not in SLICE_SUFFIXES:
                return None  # whatever it is and however large: not read
            content = begin + stream.read()
    except OSError as error:
        raise refuse("can't be opened", str(error.strerror), "check its permissions") from error
    again = "copy or export the series again"
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOn()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if _NO_IMAGE.search(content[:1024]):
            return None
        raise refuse("is damaged, or is no DICOM", last_line(error), again) from error
    tags = {key: printable(reader.GetMetaData(key)).strip() for key in reader.GetMetaDataKeys()}
    kind = tags.get("0008|0008", "").upper()
    if _number(tags.get("0028|0008")) not in (None, 1.0) or "MOSAIC" in kind:
        raise refuse("holds many slices in one (enhanced multi-frame or mosaic), which is not read", kind, _CONVERT)
    if tags.get("0028|0004", "MONOCHROME2") not in ("MONOCHROME1", "MONOCHROME2"):
        raise refuse("is a colour image", tags["0028|0004"], "give the series of grey values")
    position, orientation, spacing = (_numbers(tags.get(key)) for key in ("0020|0032", "0020|0037", "0028|0030"))
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or min(spacing) <= 0:
        raise refuse("does not say where its slice lies", f"tags {sorted(tags)[:3]} ...", _CONVERT)
    columns, rows = reader.GetSize()[:2]
    bits = _number(tags.get("0028|0100")) or 16.0
    if missing := _cut_off(content, columns * rows * int(bits) // 8):
        raise refuse("is damaged or truncated", missing, again)
    return _Slice(
        path=file,
        series=tags.get("0020|000e", ""),
        description=" ".join(tags[key] for key in ("0008|103e", "0018|1030") if tags.get(key)),
        kind=kind,
        number=int(_number(tags.get("0020|0013")) or 0),
        b=_b_value(tags),
        position=position,
        orientation=orientation,
        spacing=spacing,
        size=(columns, rows),
    )


def _cut_off(content: bytes, expected: int) -> str:
    """What is missing of the pixel data; empty when they are all there. Native or encapsulated (PS3.5 A.4), little endian."""
    at = -1
    while (at := content.find(_PIXEL_DATA, at + 1)) >= 0:
        explicit = content[at + 4 : at + 6] in (b"OW", b"OB")
        start = at + (12 if explicit else 8)
        length = int.from_bytes(content[start - 4 : start], "little")
        if length == 0xFFFFFFFF:
            return "" if content.rfind(_SEQUENCE_END) > at else "compressed pixel data without an end"
        if length in (expected, expected + 1):
            present = len(content) - start
            return f"{present} bytes of pixel data, {expected} expected" if present < expected else ""
    return "no pixel data of the image's size"


def _b_value(tags: Mapping[str, str]) -> float | None:
    for key in _B_VALUE_TAGS:
        if (b := _number(tags.get(key))) is not None and b >= 0:
            return b % 100_000 if key == "0043|1039" else b
    match = _SEQUENCE_B.search(tags.get("0018|0024", "").lower())
    return float(match[1]) if match else None


def _choose(slices: Sequence[_Slice], modality: Modality, path: Path) -> tuple[list[_Slice], list[str]]:
    """The slices of the one series that shows a modality, and what to say of the choice."""
    series = _by_series(slices)
    fitting = [each for each in series if _shows(each, modality)]
    if modality is Modality.DWI and len(fitting) > 1:
        traces = [each for each in fitting if _TRACE.search(_text(each)) or "TRACEW" in each[0].kind]
        fitting = traces if len(traces) == 1 else fitting
    if not fitting and len(series) == 1 and not any(_shows(series[0], other) for other in Modality):
        fitting = series  # its name says nothing; the user says what it is
    if len(fitting) != 1:
        raise InputRefused(
            f"it can't be told which DICOM series is the {modality.value.upper()}" if fitting
            else f"no DICOM series looks like {modality.value.upper()}",
            where=path,
            found="; ".join(sorted(_title(each) for each in series)),
            do="give a folder with the one series alone",
        )  # fmt: skip
    notes = [f"{modality.value.upper()}: DICOM series {_title(fitting[0])}"]
    return fitting[0], notes


def _by_series(slices: Sequence[_Slice]) -> list[list[_Slice]]:
    by_series: dict[tuple[object, ...], list[_Slice]] = defaultdict(list)
    for item in slices:
        # what a scanner computes (ADC beside trace) may stand under one series number
        by_series[item.series, "ADC" in item.kind.split("\\")].append(item)
    return list(by_series.values())


def _shows(series: Sequence[_Slice], modality: Modality) -> bool:
    """Whether a series looks like a modality by its description, image type and b-values."""
    text, kinds = _text(series), series[0].kind.split("\\")
    if _OTHER_MAPS.search(text):
        return False
    is_adc = "ADC" in kinds or bool(_WORDS[Modality.ADC].search(text))
    if modality is Modality.ADC:
        return is_adc
    if modality is Modality.FLAIR:
        return bool(_WORDS[Modality.FLAIR].search(text))
    weighted = any(item.b is not None and DIFFUSION_B[0] <= item.b <= DIFFUSION_B[1] for item in series)
    return not is_adc and (weighted or bool(_WORDS[Modality.DWI].search(text)))


def _text(series: Sequence[_Slice]) -> str:
    return series[0].description.lower()


def _title(series: Sequence[_Slice]) -> str:
    b_values = sorted({item.b for item in series if item.b is not None})
    shells = f", b = {', '.join(f'{b:g}' for b in b_values)}" if b_values else ""
    return f"'{series[0].description or 'without description'}' ({len(series)} images{shells})"


def _stack(series: Sequence[_Slice], path: Path, label: str) -> tuple[FloatArray, list[float] | None, Grid]:
    """Volumes (n, z, y, x) of a series, a b-value each if all slices have one, and their grid."""

    def refuse(what: str, found: str) -> InputRefused:
        return InputRefused(
            f"the {label} series {what}", where=path, found=found, do="export it again, with all its slices"
        )

    first = series[0]
    for name in ("size", "orientation", "spacing"):
        values = {tuple(round(number, 3) for number in getattr(item, name)) for item in series}
        if len(values) > 1:
            raise refuse(f"mixes slices of different {name}", "; ".join(map(str, sorted(values))))
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal) or 1.0
    places: dict[float, list[_Slice]] = defaultdict(list)
    for item in series:
        places[round(float(normal @ np.array(item.position)), 2)].append(item)
    stacks = [sorted(places[at], key=lambda item: (item.b or 0.0, item.number)) for at in sorted(places)]
    if len(stacks) < 2:
        raise refuse("is a single slice", f"{len(series)} images in one place")
    if len({tuple(item.b for item in stack) for stack in stacks}) > 1:
        counts = sorted({len(stack) for stack in stacks})
        raise refuse(
            "lacks slices", f"{' or '.join(map(str, counts))} images a place, b-values not the same everywhere"
        )
    spacing = _slice_spacing(np.array([stack[0].position for stack in stacks]), normal, refuse)
    voxels = len(series) * math.prod(first.size)
    if voxels > MOST_VOXELS:
        raise refuse("is too large to be a brain scan", f"{voxels} voxels")
    arrays = np.empty((len(stacks[0]), len(stacks), first.size[1], first.size[0]), np.float32)
    for z, stack in enumerate(stacks):
        for n, item in enumerate(stack):
            arrays[n, z] = _pixels(item, path, label)
    x, y, z_ = stacks[0][0].position
    direction = np.column_stack([across, down, normal]).ravel().tolist()
    grid = Grid(
        (first.size[0], first.size[1], len(stacks)),
        (first.spacing[1], first.spacing[0], spacing),
        (x, y, z_),
        tuple(direction),
    )
    b_values = [item.b for item in stacks[0]]
    return arrays, [b for b in b_values if b is not None] if None not in b_values else None, grid


def _slice_spacing(positions: FloatArray, normal: FloatArray, refuse: object) -> float:
    """Distance of neighbouring slices (mm). Raises what `refuse` makes when a slice is missing or the stack leans."""
    assert callable(refuse)
    along = positions @ normal
    gaps = np.diff(along)
    spacing = float((along[-1] - along[0]) / (len(along) - 1))
    if np.abs(gaps - spacing).max() > max(_UNEVEN * spacing, 0.02):
        raise refuse(
            "lacks slices", f"distances of {gaps.min():.2f} to {gaps.max():.2f} mm between {len(along)} slices"
        )
    aside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.abs(aside).max() > max(_ASIDE_MM, SKEW * float(along[-1] - along[0])):
        raise refuse("leans: its slices are not stacked at right angles", f"up to {np.abs(aside).max():.1f} mm aside")
    return spacing


def _pixels(item: _Slice, path: Path, label: str) -> AnyArray:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(item.path))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise InputRefused(
            f"a file of the {label} series is damaged",
            where=_inside(item.path, path),
            found=last_line(error),
            do="copy or export the series again",
        ) from error
    return array.reshape(item.size[1], item.size[0])


def _inside(file: Path, path: Path) -> str:
    """A file as the user knows it, not as it lies in our temporary folder."""
    return str(file) if path.is_dir() else f"{path} ({file.name})"


def _number(text: str | None) -> float | None:
    return values[0] if (values := _numbers(text)) else None


def _numbers(text: str | None) -> tuple[float, ...]:
    """The numbers of a multi-valued tag; none where it is missing or is no list of finite numbers."""
    try:
        values = tuple(float(part) for part in (text or "").split("\\") if part.strip())
    except ValueError:
        return ()
    return values if all(map(math.isfinite, values)) else ()
