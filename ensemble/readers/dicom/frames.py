"""Read one DICOM file into one record per frame or tile: position, diffusion weighting, rescale, and where its pixels are.

Classic, Enhanced and Legacy Converted Enhanced MR (PS3.3 C.7.6.2, C.7.6.16, C.8.13), Siemens mosaics, United Imaging's VFRAME.
Nothing is judged here but a file by itself: what is wrong with it is kept, for the case that its series is chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ensemble.readers.b_values import SAME_SHELL
from ensemble.readers.dicom import facts
from ensemble.readers.dicom.facts import MALFORMED, items_of, number_of, numbers_of, text_of, texts_of
from ensemble.readers.dicom.header import DicomHeader
from ensemble.text import replace_undecodable

CONVERT = "convert it with dcm2niix -p n and give the .nii.gz"
AGAIN = "copy or export the series again"
#: Frames of one file, and voxels along an axis of one; more is a damaged header.
MAX_FRAMES, MAX_ROWS = 65_536, 16_384
#: Transfer syntaxes that store pixels as they are.
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_CODED_BITS = (8, 16, 32)
#: Deviation of a slice's two axes from unit length and a right angle (as cosines) beyond which they name no plane.
_NO_PLANE = 0.02


@dataclass(frozen=True)
class FileProblem:
    """Why a file can't be read. `what` completes a sentence that begins "a file of the DWI series"."""

    what: str
    found: str
    do: str = AGAIN


@dataclass(frozen=True)
class StoredPixels:
    """How the pixels of a file are stored: encoding, size and place in the file."""

    syntax: UID
    start: int
    length: int | None
    """Bytes; None for encapsulated pixels."""
    vr: str
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    inverted: bool
    """MONOCHROME1: the largest stored value is black."""

    @property
    def is_sized(self) -> bool:
        """Whether the header gives a valid image size."""
        return 1 <= self.rows <= MAX_ROWS and 1 <= self.columns <= MAX_ROWS and self.frames <= MAX_FRAMES

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * self.bits_allocated // 8

    @property
    def deflated(self) -> bool:
        return bool(self.syntax == DeflatedExplicitVRLittleEndian)

    @property
    def big_endian(self) -> bool:
        return bool(self.syntax == ExplicitVRBigEndian)


@dataclass(frozen=True)
class SlicePlane:
    """Position, orientation and pixel spacing of a slice (LPS, mm)."""

    position: tuple[float, ...]
    """Of the centre of the first voxel."""
    orientation: tuple[float, ...]
    """Directions along a row and down a column, as cosines."""
    spacing: tuple[float, ...]
    """Between rows, between columns."""


@dataclass(frozen=True, eq=False)
class Instance:
    """The attributes of one file that all its frames share."""

    path: Path
    sop_instance: str
    sop_class: str
    study: str
    series: str
    number: int | None
    """Of the series."""
    words: tuple[str, ...]
    """Series description and protocol name, those that exist and differ."""
    other: str
    """What it is where it can't be a grey MR image; empty if it may be one."""
    stored: StoredPixels | None
    problem: FileProblem | None = None

    @property
    def description(self) -> str:
        """The name by which people know the series."""
        return " ".join(self.words)


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice of a series: a frame of a file, or a tile of one, with what its header says about it."""

    instance: Instance
    index: int
    """Of the frame in its file, from 0."""
    image_type: tuple[str, ...] = ()
    """ImageType or FrameType, in capitals, followed by values from other elements (`_completed`)."""
    codes: tuple[str, ...] = ()
    """Of derivations."""
    size: tuple[int, int] = (0, 0)
    """Columns, rows."""
    tile: tuple[int, int] | None = None
    """Row and column in the stored frame at which the slice begins, where it is a tile of one."""
    plane: SlicePlane | None = None
    """None if the header does not state it."""
    b: float | None = None
    direction: str = ""
    """See `facts.diffusion_directionality`."""
    slope: float = 1.0
    intercept: float = 0.0
    echo_ms: float | None = None
    """Echo time; None if not stated."""
    order: tuple[float, ...] = ()
    """Numbers that give the order of acquisition: temporal position, acquisition, instance, frame."""

    @property
    def made(self) -> int:
        """How derived a diffusion-weighted image is: 0 acquired, 1 derived from one direction, 2 mean over directions, 3 other."""
        if (self.b or 0.0) <= SAME_SHELL:
            return 0
        if self.direction == "isotropic":
            return 2
        return (1 if self.direction == "directional" else 3) if self.image_type[:1] == ("DERIVED",) else 0

    def same_as(self, other: Frame) -> bool:
        """Return whether two frames have equal headers, file names aside."""
        return replace(self, instance=other.instance).__dict__ == other.__dict__


@dataclass(frozen=True)
class _Reading:
    """A header while its frames are being read."""

    dataset: Dataset
    maker: str
    image_type: tuple[str, ...]


def read_frames(path: Path, header: DicomHeader) -> list[Frame]:
    """Return the frames of a file. A file that is not a readable grey image gives one frame that states the problem.

    Raises one of MALFORMED for a header that makes no sense.
    """
    dataset = header.dataset
    instance = _instance(path, header)
    reading = _Reading(dataset, text_of(dataset, "Manufacturer"), _capitals(dataset, "ImageType"))
    image_type = _completed(reading, (dataset,), (dataset,), reading.image_type)
    plain = Frame(instance, 0, image_type, _codes((dataset,)), plane=_plane(dataset, dataset, dataset))
    if instance.stored is None or instance.problem or instance.other:
        return [plain]
    try:
        return list(_kind_of_file(reading)(reading, plain))
    except MALFORMED as error:
        found = str(error) or type(error).__name__
        return [_with_problem(plain, FileProblem("has an invalid header", found))]


def _kind_of_file(reading: _Reading) -> Callable[[_Reading, Frame], Iterator[Frame]]:
    dataset = reading.dataset
    if "PerFrameFunctionalGroupsSequence" in dataset:
        return _enhanced
    if "MOSAIC" in reading.image_type:
        return _mosaic
    if "VFRAME" in reading.image_type or facts.TILES.tag_in(dataset, reading.maker) is not None:
        return _united_imaging
    return _classic


def _instance(path: Path, header: DicomHeader) -> Instance:
    dataset = header.dataset
    sop_class = text_of(dataset, "SOPClassUID")
    other = facts.describe_non_mr_object(sop_class)
    stored, problem = None, None
    if header.pixels is not None or not other:
        stored, problem = _stored(header)
    samples = number_of(dataset, "SamplesPerPixel") or 1
    grey = text_of(dataset, "PhotometricInterpretation") or _GREY[1]
    if not other and (samples != 1 or grey not in _GREY):
        other = facts.SeriesKind.COLOUR
    number = number_of(dataset, "SeriesNumber")
    words = dict.fromkeys(replace_undecodable(text_of(dataset, key)) for key in ("SeriesDescription", "ProtocolName"))
    return Instance(
        path=path,
        sop_instance=text_of(dataset, "SOPInstanceUID"),
        sop_class=sop_class,
        study=text_of(dataset, "StudyInstanceUID"),
        series=text_of(dataset, "SeriesInstanceUID"),
        number=None if number is None else int(number),
        words=tuple(word for word in words if word),
        other=str(other),
        stored=stored,
        problem=problem,
    )


def _stored(header: DicomHeader) -> tuple[StoredPixels, FileProblem | None]:
    """Return how the pixels are stored, and the problem if there is one."""
    dataset, pixels = header.dataset, header.pixels

    def whole(keyword: str, otherwise: int) -> int:
        number = number_of(dataset, keyword)
        return otherwise if number is None else int(number)

    bits = whole("BitsAllocated", 16)
    stored = StoredPixels(
        syntax=header.syntax,
        start=pixels.start if pixels else 0,
        length=pixels.length if pixels else 0,
        vr=pixels.vr if pixels else "",
        rows=whole("Rows", 0),
        columns=whole("Columns", 0),
        frames=max(whole("NumberOfFrames", 1), 1),
        bits_allocated=bits,
        bits_stored=whole("BitsStored", bits),
        signed=whole("PixelRepresentation", 0) == 1,
        inverted=text_of(dataset, "PhotometricInterpretation") == _GREY[0],
    )
    size = f"{stored.columns} x {stored.rows}, {stored.frames} frames, {stored.bits_stored} of {bits} bits"
    if not stored.is_sized:
        return stored, FileProblem("is damaged: its header describes no image", size)
    if pixels is None:
        return stored, FileProblem("is damaged or truncated", "no pixel data")
    if pixels.tag != facts.INTEGER_PIXELS or bits not in _CODED_BITS or not 1 <= stored.bits_stored <= bits:
        return stored, FileProblem("has pixels of an unsupported type", size, CONVERT)
    if number_of(dataset, "HighBit") not in (None, stored.bits_stored - 1):
        return stored, FileProblem(
            "has pixels of an unsupported type", f"high bit {number_of(dataset, 'HighBit'):g}", CONVERT
        )
    if "ModalityLUTSequence" in dataset:
        return stored, FileProblem("has a modality LUT, which is not supported", size, CONVERT)
    if header.syntax not in NATIVE:
        return stored, None if pixels.length is None else FileProblem(
            "is damaged", "compressed pixel data that are not encapsulated"
        )
    expected, present = stored.frames * stored.frame_bytes, header.bytes - pixels.start
    if pixels.length is None or pixels.length < expected:
        return stored, FileProblem(
            "is damaged or truncated", f"{pixels.length} bytes of pixel data, {expected} expected"
        )
    if present < expected:
        return stored, FileProblem("is damaged or truncated", f"{present} bytes of pixel data, {expected} expected")
    return stored, None


def _classic(reading: _Reading, plain: Frame) -> Iterator[Frame]:
    dataset, stored = reading.dataset, _pixels_of(plain)
    if stored.frames > 1:
        yield _with_problem(
            plain, FileProblem("has several frames without positions", f"{stored.frames} frames", CONVERT)
        )
        return
    slope, intercept = _rescale((dataset,))
    yield replace(
        plain,
        size=(stored.columns, stored.rows),
        b=_b(reading, (dataset,), plain.image_type),
        direction=facts.diffusion_directionality((dataset,), reading.maker, plain.image_type),
        slope=slope,
        intercept=intercept,
        echo_ms=number_of(dataset, "EchoTime"),
        order=_order(dataset, 0),
    )


def _enhanced(reading: _Reading, plain: Frame) -> Iterator[Frame]:
    dataset, stored = reading.dataset, _pixels_of(plain)
    groups = items_of(dataset, "PerFrameFunctionalGroupsSequence")
    if len(groups) != stored.frames:
        yield _with_problem(
            plain,
            FileProblem(
                "has a different number of frames from what its header says", f"{len(groups)} of {stored.frames}"
            ),
        )
        return
    shared = next(iter(items_of(dataset, "SharedFunctionalGroupsSequence")), Dataset())
    for index, group in enumerate(groups):

        def macro(keyword: str, group: Dataset = group) -> Dataset:
            """Return the functional group of this frame; if there is none, the shared one."""
            found = next(iter(items_of(group, keyword)), None)
            return found if found is not None else next(iter(items_of(shared, keyword)), Dataset())

        frame_type = macro("MRImageFrameTypeSequence")
        image_type = _capitals(frame_type, "FrameType") or reading.image_type
        diffusion = macro("MRDiffusionSequence")
        philips = next(
            (i for tag in [facts.PHILIPS_FRAME.tag_in(group, reading.maker)] if tag for i in items_of(group, tag)), None
        )
        sources = [
            diffusion,
            *items_of(diffusion, "DiffusionGradientDirectionSequence"),
            *(macro(keyword) for keyword in facts.CONVERTED),
            *([] if philips is None else [philips]),
            dataset,
        ]
        direction = facts.diffusion_directionality(sources, reading.maker, image_type)
        b = _b(reading, sources, image_type)
        if b is None and direction == "none":
            b = 0.0
        transformed = (macro("PixelValueTransformationSequence"), dataset)
        slope, intercept = _rescale(transformed)
        derivations = (*items_of(group, "DerivationImageSequence"), *items_of(shared, "DerivationImageSequence"))
        yield replace(
            plain,
            index=index,
            image_type=_completed(reading, (frame_type, dataset), transformed, image_type),
            codes=(*plain.codes, *_codes(derivations)),
            size=(stored.columns, stored.rows),
            plane=_plane(
                macro("PlanePositionSequence"), macro("PlaneOrientationSequence"), macro("PixelMeasuresSequence")
            ),
            b=b,
            direction=direction,
            slope=slope,
            intercept=intercept,
            echo_ms=number_of(macro("MREchoSequence"), "EffectiveEchoTime"),
            order=_order(dataset, index),
        )


def _mosaic(reading: _Reading, plain: Frame) -> Iterator[Frame]:
    """Yield the tiles of a Siemens mosaic: a square of slices in one image, whose header position refers to the whole square."""
    dataset, stored = reading.dataset, _pixels_of(plain)
    csa = _csa(reading)
    count, normal = csa.get("NumberOfImagesInMosaic", ()), csa.get("SliceNormalVector", ())
    distance = numbers_of(dataset, "SpacingBetweenSlices") or csa.get("SpacingBetweenSlices", ())
    if not count or len(normal) != 3 or not distance or distance[0] <= 0:
        found = f"CSA header: {'there' if csa else 'missing'}"
        yield _with_problem(
            plain,
            FileProblem("is a mosaic without the CSA header that gives the positions of its slices", found, CONVERT),
        )
        return
    tiles = int(count[0])
    side = math.ceil(math.sqrt(max(tiles, 1)))
    whole = next(_classic(reading, plain))
    grid = _tiles(stored, tiles, side, side)
    if not grid or whole.plane is None:
        yield _with_problem(
            plain,
            FileProblem(
                "is a mosaic that can't be cut into slices",
                f"{tiles} slices in {stored.columns} x {stored.rows}",
                CONVERT,
            ),
        )
        return
    height, width = stored.rows // side, stored.columns // side
    across, down = np.reshape(whole.plane.orientation, (2, 3))
    first = np.array(whole.plane.position)
    first = (
        first
        + across * whole.plane.spacing[1] * (stored.columns - width) / 2
        + down * whole.plane.spacing[0] * (stored.rows - height) / 2
    )
    for k, tile in enumerate(grid):
        position = first + np.array(normal) * distance[0] * k
        yield replace(
            whole, size=(width, height), tile=tile, plane=replace(whole.plane, position=tuple(position.tolist()))
        )


def _united_imaging(reading: _Reading, plain: Frame) -> Iterator[Frame]:
    """Yield the tiles of United Imaging's VFRAME ("GRID"), each with its own position."""
    dataset, stored = reading.dataset, _pixels_of(plain)
    tag, count = (element.tag_in(dataset, reading.maker) for element in (facts.TILES, facts.TILE_COUNT))
    items = items_of(dataset, tag) if tag else ()
    told = numbers_of(dataset, count, facts.TILE_COUNT.vr) if count else ()
    side = math.ceil(math.sqrt(max(len(items), 1)))
    grid = _tiles(stored, len(items), math.ceil(len(items) / side), side)
    if not grid or (told and int(told[0]) != len(items)):
        found = f"{len(items)} positions for {told[0]:g} slices" if told else f"{len(items)} places"
        yield _with_problem(plain, FileProblem("has tiles without positions", found, CONVERT))
        return
    whole = next(_classic(reading, plain))
    height, width = stored.rows // math.ceil(len(items) / side), stored.columns // side
    for item, tile in zip(items, grid, strict=True):
        oriented, measured = (item if key in item else dataset for key in ("ImageOrientationPatient", "PixelSpacing"))
        own = facts.b_value((item,), reading.maker)
        yield replace(
            whole,
            size=(width, height),
            tile=tile,
            plane=_plane(item, oriented, measured),
            b=whole.b if own is None else own,
        )


def _tiles(stored: StoredPixels, tiles: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the row and column at which each tile begins; empty if so many tiles do not fit."""
    if not 2 <= tiles <= rows * columns or stored.rows % rows or stored.columns % columns or stored.frames > 1:
        return []
    height, width = stored.rows // rows, stored.columns // columns
    return [(k // columns * height, k % columns * width) for k in range(tiles)]


def _csa(reading: _Reading) -> dict[str, tuple[float, ...]]:
    """Return the numbers in a Siemens CSA image header; empty if missing or unreadable."""
    if (tag := facts.CSA_HEADER.tag_in(reading.dataset, reading.maker)) is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel warns that this part is experimental
        from nibabel.nicom import csareader
    try:
        tags = csareader.read(reading.dataset[tag].value)["tags"]
    except (*MALFORMED, csareader.CSAError):
        return {}
    return {name: numbers for name, entry in tags.items() if (numbers := _csa_numbers(entry.get("items", ())))}


def _csa_numbers(items: Sequence[object]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(str(item)) for item in items)
    except ValueError:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _plane(placed: Dataset, oriented: Dataset, measured: Dataset) -> SlicePlane | None:
    """Return the position of a slice; None if position, orientation or spacing is missing or invalid."""
    position, orientation = numbers_of(placed, "ImagePositionPatient"), numbers_of(oriented, "ImageOrientationPatient")
    spacing = numbers_of(measured, "PixelSpacing")
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or min(spacing) <= 0:
        return None
    axes = np.reshape(orientation, (2, 3))
    if np.abs(axes @ axes.T - np.eye(2)).max() > _NO_PLANE:
        return None
    return SlicePlane(position, orientation, spacing)


def _b(reading: _Reading, sources: Sequence[Dataset], image_type: Sequence[str]) -> float | None:
    """Return a frame's b-value from its elements, the Siemens CSA header or the sequence name."""
    if (b := facts.b_value(sources, reading.maker)) is not None:
        return b
    if "siemens" in reading.maker.lower() and "DIFFUSION" in image_type and (csa := _csa(reading).get("B_value", ())):
        return csa[0]
    return facts.b_value_in_sequence_name(text_of(reading.dataset, "SequenceName"))


def _rescale(sources: Sequence[Dataset]) -> tuple[float, float]:
    """Return slope and intercept of the first public rescale; a slope of 0 counts as missing."""
    for dataset in sources:
        if (slope := number_of(dataset, "RescaleSlope")) is not None and slope != 0:
            return slope, number_of(dataset, "RescaleIntercept") or 0.0
    return 1.0, 0.0


def _order(dataset: Dataset, index: int) -> tuple[float, ...]:
    keys = ("TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber")
    return (*(number_of(dataset, key) or 0.0 for key in keys), float(index))


def _codes(sources: Sequence[Dataset]) -> tuple[str, ...]:
    return tuple(
        text_of(code, "CodeValue") for source in sources for code in items_of(source, "DerivationCodeSequence")
    )


def _completed(
    reading: _Reading, sources: Sequence[Dataset], rescaled: Sequence[Dataset], image_type: tuple[str, ...]
) -> tuple[str, ...]:
    """Return an image type extended by what it does not say itself: part of a complex signal, or diffusivities."""
    word = facts.complex_part(sources, reading.maker)
    if not word and facts.holds_diffusivities(rescaled) and facts.kind_from_image_type(image_type, ()) is None:
        word = "ADC"
    return (*image_type, *("",) * (2 - len(image_type)), word) if word else image_type


def _capitals(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    return tuple(value.upper() for value in texts_of(dataset, keyword))


def _pixels_of(frame: Frame) -> StoredPixels:
    assert frame.instance.stored is not None
    return frame.instance.stored


def _with_problem(frame: Frame, problem: FileProblem) -> Frame:
    return replace(frame, instance=replace(frame.instance, problem=problem))
