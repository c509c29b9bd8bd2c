"""Vendor differences as tables: where b-values and directions are stored, and how kinds of images are named.

Sources: DICOM PS3.3 C.8.13.5.9 (diffusion), C.7.6.1.1.2 and C.8.13.3.1.1 (image type), PS3.16 CID 7203 (derivations), PS3.4 B.5 (SOP
classes); the vendors' conformance statements; dcm2niix's notes on each vendor, checked on real files.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import BaseTag, Tag

#: Pixel data as integers (7FE0,0010), floats or doubles.
INTEGER_PIXELS = 0x7FE00010
PIXEL_DATA = frozenset((INTEGER_PIXELS, 0x7FE00008, 0x7FE00009))
_BINARY = {"FD": "d", "FL": "f", "US": "H", "SS": "h"}
#: What pydicom and its decoders raise of bytes that are no DICOM.
MALFORMED = (
    *(AttributeError, TypeError, ValueError, LookupError, NameError, AssertionError, ArithmeticError, RuntimeError),
    *(EOFError, OSError, MemoryError, struct.error, zlib.error, BytesLengthException, InvalidDicomError),
)


@dataclass(frozen=True)
class PrivateElement:
    """A private element, found by its creator, or by the manufacturer if de-identification removed the creators."""

    group: int
    creator: re.Pattern[str]
    maker: re.Pattern[str]
    element: int
    vr: str
    """What its bytes mean where it arrives as UN."""

    @cached_property
    def creators(self) -> list[BaseTag]:
        return [Tag(self.group, block) for block in _BLOCKS]

    @cached_property
    def places(self) -> list[BaseTag]:
        return [Tag(self.group, block << 8 | self.element) for block in _BLOCKS]

    def tag_in(self, dataset: Dataset, maker: str) -> BaseTag | None:
        """Return the element's tag in a data set of this manufacturer; None if it is missing."""
        creators = {
            tag: text_of(dataset, creator)
            for tag, creator in zip(self.places, self.creators, strict=True)
            if creator in dataset
        }
        tags = [tag for tag, creator in creators.items() if self.creator.search(creator)]
        if not creators and (not maker or self.maker.search(maker)):
            tags = self.places[:1]
        return next((tag for tag in tags if tag in dataset), None)


def _vendor(creator: str, maker: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(creator, re.IGNORECASE), re.compile(maker, re.IGNORECASE)


#: Blocks of private elements that are looked into.
_BLOCKS = tuple(range(0x10, 0x18))
_SIEMENS, _SIEMENS_CSA = _vendor("^SIEMENS MR HEADER", "siemens"), _vendor("^SIEMENS CSA HEADER", "siemens")
_GE = _vendor("^GEMS_PARM_01", r"^ge\b")
_PHILIPS, _UNITED = (
    _vendor("^Philips Imaging DD 001", "philips"),
    _vendor("^Image Private Header", "uih|united imaging"),
)

#: b-values (s/mm^2), in the order of trust. GE adds millions to some.
STANDARD_B = Tag(0x0018, 0x9087)
PRIVATE_B = (
    PrivateElement(0x0019, *_SIEMENS, 0x0C, "IS"),
    PrivateElement(0x2001, *_PHILIPS, 0x03, "FL"),
    PrivateElement(0x0065, *_UNITED, 0x09, "FD"),
    PrivateElement(0x0043, *_GE, 0x39, "IS"),
)
_GE_SURPLUS = 100_000
#: Sequence names with a single b-value: Siemens' `*ep_b1000#3` and `ep_b1000t`.
_SEQUENCE_B = re.compile(r"_b(\d+)(?:t|#\d+)?$")

#: Whether a frame is weighted along one direction or all: words of (0018,9075), and vendors' own.
DIRECTIONALITY, ORIENTATION = Tag(0x0018, 0x9075), Tag(0x0018, 0x9089)
_PRIVATE_DIRECTION = (
    (
        PrivateElement(0x0019, *_SIEMENS, 0x0D, "CS"),
        {"ISOTROPIC": "isotropic", "DIRECTIONAL": "directional", "NONE": "none"},
    ),
    (PrivateElement(0x2001, *_PHILIPS, 0x04, "CS"), {"I": "isotropic"}),
)
_PRIVATE_ORIENTATION = (PrivateElement(0x0065, *_UNITED, 0x37, "FD"), PrivateElement(0x0019, *_SIEMENS, 0x0E, "FD"))

#: Which part of a complex signal an image shows: words of (0008,9208), and GE's numbers from 1.
_GE_PART, _GE_PARTS = PrivateElement(0x0043, *_GE, 0x2F, "SS"), ("PHASE", "REAL", "IMAGINARY")

#: Siemens mosaics: the CSA header that tells how many tiles there are and where they lie. United Imaging: tiles with places of their own.
CSA_HEADER = PrivateElement(0x0029, *_SIEMENS_CSA, 0x10, "OB")
TILES, TILE_COUNT = PrivateElement(0x0065, *_UNITED, 0x51, "SQ"), PrivateElement(0x0065, *_UNITED, 0x50, "DS")
#: Attributes that a conversion to multi-frame put aside, and Philips' own copy of a classic header.
CONVERTED = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
PHILIPS_FRAME = PrivateElement(0x2005, *_vendor("^Philips MR Imaging DD 005", "philips"), 0x0F, "SQ")

_KEYWORDS = (
    *(
        "SpecificCharacterSet",
        "ImageType",
        "SOPClassUID",
        "SOPInstanceUID",
        "Modality",
        "Manufacturer",
        "StudyInstanceUID",
    ),
    *("SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ProtocolName", "SequenceName", "InstanceNumber"),
    *(
        "AcquisitionNumber",
        "TemporalPositionIdentifier",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
    ),
    *("SpacingBetweenSlices", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *(
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
    ),
    *("ModalityLUTSequence", "DiffusionBValue", "DiffusionDirectionality", "DiffusionGradientOrientation"),
    *(
        "EchoTime",
        "EffectiveEchoTime",
        "MRDiffusionSequence",
        "DerivationCodeSequence",
        "ComplexImageComponent",
        "SharedFunctionalGroupsSequence",
    ),
    *("PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
_PRIVATE = (
    *PRIVATE_B,
    *(element for element, _ in _PRIVATE_DIRECTION),
    *_PRIVATE_ORIENTATION,
    *(_GE_PART, CSA_HEADER, TILES, TILE_COUNT, PHILIPS_FRAME),
)
#: Everything that is read of a header.
TAGS: list[BaseTag | int] = sorted(
    {
        *(Tag(tag) for keyword in _KEYWORDS if (tag := tag_for_keyword(keyword)) is not None),
        *(tag for element in _PRIVATE for tag in (*element.creators, *element.places)),
    }
)


class SeriesKind(StrEnum):
    """The kind of image in a series, according to its header."""

    DWI = "DWI"
    ADC = "ADC"
    FLAIR = "FLAIR"
    UNKNOWN = "unknown"
    """A grey-scale image whose name does not state what it shows: the user may state it."""
    EXPONENTIAL = "exponential ADC"
    ANISOTROPY = "fractional anisotropy"
    TENSOR = "diffusion tensor"
    DIFFUSIVITY = "map made of diffusion images"
    COMPUTED = "image computed for a b-value that was not measured"
    PHASE = "phase image"
    COMPLEX = "real or imaginary part of an image"
    LOCALIZER = "localizer"
    OTHER = "image of another contrast"
    PROJECTION = "projection"
    COLOUR = "colour image"
    SCREENSHOT = "screenshot (secondary capture)"
    FOREIGN = "object that is no MR image"


@dataclass(frozen=True)
class _Named:
    """The patterns by which a kind of image is recognised."""

    kind: SeriesKind
    image_type: re.Pattern[str]
    """Of one value of ImageType or FrameType, in capitals."""
    text: re.Pattern[str]
    """Of the description, in lower case."""
    code: str = ""
    """In the derivation (DCM), CID 7203."""


def _named(kind: SeriesKind, image_type: str = "(?!)", text: str = "(?!)", code: str = "") -> _Named:
    return _Named(kind, re.compile(image_type), re.compile(text), code)


#: Words of a diffusion acquisition; maps made of one are called after it.
_ACQUIRED = "dwi|diff|dti|dki|ivim"
#: Told by image type or derivation first, then by words; the first that fits.
_MAPS = (
    _named(
        SeriesKind.EXPONENTIAL,
        r"E[-_]?ADC|EXP|EXP_?ADC|EXPONENTIAL|.*ATTNTD",
        r"(?<![a-z])e(x|xp)?[-_ ]?adc|(?<![a-z])d?exp(?![a-z])|expon|attenuat",
        "113045",
    ),
    _named(
        SeriesKind.ADC,
        r".*ADC.*|APPARENT.*",
        r"adc(?!oil)|app?arent|diff?us.*[ck]oef|[ck]oef.*diff?us|(?<![a-z])(average[-_ ]|av)dc(?![a-z])",
        "113041",
    ),
    _named(
        SeriesKind.ANISOTROPY,
        r"FA|COLFA|FA_.*|(FRACT|RELAT).*ANISO.*|DIFFUSION_ANISO",
        r"(?<![a-z])(col|colou?r)?[-_ ]?fa(map)?(?![a-z0-9])|anisotrop|fractional.?aniso",
        "113044",
    ),
    _named(SeriesKind.TENSOR, r"TENSOR.*", r"(?<![a-z])tensor$"),
    _named(
        SeriesKind.DIFFUSIVITY,
        r"MD|EIGEN.*|KURTOSIS|VOLUME_RATIO|STD_?DEV.*|MASK",
        r"eigen|kurtos|mean.?diffusivity|(?<![a-z])n?md(?![a-z])"
        rf"|^(?=.*({_ACQUIRED})).*(?<![a-z])(mk|ak|rk|ad|rd|ra|vr|dec|l[123]|s0|maps?|masks?|error|residuals?|std\w*|ratio)(?![a-z])",
    ),
    _named(
        SeriesKind.COMPUTED,
        "CALC_BVALUE|SYNTHETIC.*|COMPUTED.*",
        rf"calc[-_ ]?b|(?<![a-z])cdwi|(?<![a-z])(syn|synth\w*|computed|calculated)(?![a-z]).*({_ACQUIRED}|(?<![a-z])b)",
    ),
    _named(
        SeriesKind.PROJECTION, "MIP|MNIP|MINIP|PROJECTION IMAGE|MIN_IP|MAX_IP", r"(?<![a-z])(mip|mnip|minip)(?![a-z])"
    ),
)
_UNLIKE = (
    _named(SeriesKind.LOCALIZER, "LOCALIZER", r"locali[sz]er|scout|survey"),
    _named(SeriesKind.PHASE, "P|P_.*|PHASE|PHASE[ _]MAP", r"(?<![a-z])(phase|pha_images?)(?![a-z])"),
    _named(SeriesKind.COMPLEX, "R|R_.*|REAL|I|I_.*|IMAG|IMAGINARY"),
    _named(SeriesKind.OTHER, "B0|B0[ _]MAP|SWI|SUBTRACT(ION)?|[TR][12]?[ _*]*MAP|R?CB[FV].*|MTT.*|TTP.*|TMAX.*"),
)
_FLAIR = re.compile(r"flair|tirm|dark.?fl|da-?fl|spc_ir")
_DIFFUSION = re.compile(r"dwi|diff|trace|(?<![a-z])(dti|s?dw)(?![a-z])|(?<![a-z])b ?=? ?1000")
_OTHER = re.compile(
    r"(?<![a-z])(t[12](w|map|star)?|pdw?|mp2?rage|f?spgr|bravo|stir|ciss|fiesta\w*|gre|hemo\w*|mag_images?|swi|swan|qsm|tof|mra|angio\w*"
    r"|perf\w*|pwi|dsc|dce|(r|rel)?cb[fv]|(rel)?mtt|tmax|ttp|asl|bold|spectro\w*|field.?map\w*|b0.?map)(?![a-z])"
)
#: b-values in a description: `b1000`, `b = 0, 1000`.
_NAMED_B = re.compile(r"(?<![a-z])b[-_ =]*(\d+(?:[-_/,; ]+\d+)*)")
_TRACE_TYPE, _TRACE_TEXT = re.compile("TRACEW?|ISO|COMBINED"), re.compile("trace")

#: SOP classes of MR images: classic, Enhanced, Legacy Converted Enhanced.
MR_IMAGES = tuple("1.2.840.10008.5.1.4.1.1." + end for end in ("4", "4.1", "4.4"))
#: DICOMDIR.
DIRECTORY = "1.2.840.10008.1.3.10"
#: Objects without an image of a slice, and other objects in a folder, by the beginning of their SOP class.
_CLASSES = (
    ("1.2.840.10008.5.1.4.1.1.11", "presentation state"),
    ("1.2.840.10008.5.1.4.1.1.88", "structured report"),
    ("1.2.840.10008.5.1.4.1.1.66.4", "segmentation"),
    ("1.2.840.10008.5.1.4.1.1.66", "raw data or registration"),
    ("1.2.840.10008.5.1.4.1.1.104", "document"),
    ("1.2.840.10008.5.1.4.1.1.9", "waveform"),
    ("1.2.840.10008.5.1.4.1.1.4.2", "spectroscopy"),
    ("1.2.840.10008.5.1.4.1.1.4.3", SeriesKind.COLOUR),
    ("1.2.840.10008.5.1.4.1.1.7", SeriesKind.SCREENSHOT),
)
#: Of values that are diffusivities (0028,1054).
_DIFFUSIVITY_UNIT = re.compile(r"^adc|mm\^?[2²] */ *s")
_UID = re.compile(r"[0-9.]{1,64}")
_STANDARD_ROOT = "1.2.840.10008."


def describe_non_mr_object(sop_class: str) -> str:
    """Return in words what an object other than an MR image is; empty for MR images and unknown classes."""
    if sop_class in MR_IMAGES or not _UID.fullmatch(sop_class):
        return ""
    if not sop_class.startswith(_STANDARD_ROOT):
        return "object of a private class"
    return next(
        (str(what) for root, what in _CLASSES if sop_class == root or sop_class.startswith(root + ".")),
        SeriesKind.FOREIGN,
    )


def kind_from_image_type(image_type: Sequence[str], codes: Sequence[str]) -> SeriesKind | None:
    """Return the kind that a frame's image type or derivation code determines; None if they do not."""
    flavours = image_type[2:]
    for named in (*_MAPS, *_UNLIKE):
        if any(named.image_type.fullmatch(value) for value in flavours) or (named.code and named.code in codes):
            return named.kind
    return SeriesKind.DWI if "TRACEW" in flavours else None


def kind_from_description(words: Sequence[str], shells: int, *, weighted: bool) -> SeriesKind:
    """Return the kind of a series, as the first of `words` (description, protocol name) that states one says.

    `shells` is the number of its b-values, `weighted` whether any is above 0. A series with several b-values is a DWI whatever its
    protocol is called, because maps have none (though a header may hold one).
    """
    kinds = [_kind_in(text.lower(), maps=shells < 2, weighted=weighted) for text in words]
    return next(
        (kind for kind in kinds if kind is not SeriesKind.UNKNOWN), SeriesKind.DWI if weighted else SeriesKind.UNKNOWN
    )


def _kind_in(text: str, *, maps: bool, weighted: bool) -> SeriesKind:
    for named in _MAPS if maps else ():
        if named.text.search(text):
            return named.kind
    if weighted:
        return SeriesKind.DWI
    if _FLAIR.search(text):
        return SeriesKind.FLAIR
    if _DIFFUSION.search(text):
        return SeriesKind.DWI
    unlike = next((named.kind for named in _UNLIKE if named.text.search(text)), None)
    return unlike or (SeriesKind.OTHER if _OTHER.search(text) else SeriesKind.UNKNOWN)


def is_trace(image_type: Sequence[str], text: str) -> bool:
    """Return whether a diffusion series is the scanner's mean over directions, by image type or description (in lower case)."""
    return any(_TRACE_TYPE.fullmatch(value) for value in image_type[2:]) or bool(_TRACE_TEXT.search(text))


def b_value(sources: Sequence[Dataset], maker: str) -> float | None:
    """Return the b-value (s/mm^2) in the first data set that has one; None if none has."""
    for dataset in sources:
        if STANDARD_B in dataset and (b := number_of(dataset, STANDARD_B)) is not None and b >= 0:
            return b
    for dataset in sources:
        for element in PRIVATE_B:
            if (tag := element.tag_in(dataset, maker)) is not None:
                values = numbers_of(dataset, tag, element.vr)
                if values and values[0] >= 0:
                    return values[0] % _GE_SURPLUS if element.group == 0x0043 else values[0]
    return None


def b_value_in_sequence_name(name: str) -> float | None:
    """Return the b-value in a sequence name."""
    match = _SEQUENCE_B.search(name.lower())
    return float(match[1]) if match else None


def holds_diffusivities(sources: Sequence[Dataset]) -> bool:
    """Return whether pixel values are ADC: the first Rescale Type found in the data sets says so, or names a unit of diffusivity."""
    word = next((word for dataset in sources if (word := text_of(dataset, "RescaleType"))), "")
    return bool(_DIFFUSIVITY_UNIT.search(word.lower()))


def b_values_in_description(text: str) -> tuple[float, ...]:
    """Return the b-values named in a description (in lower case)."""
    return tuple(float(digits) for listed in _NAMED_B.findall(text) for digits in re.findall(r"\d+", listed))


def complex_part(sources: Sequence[Dataset], maker: str) -> str:
    """Return PHASE, REAL or IMAGINARY for images of one part of a complex signal; else empty.

    Empty for magnitude images, and if the header does not state it.
    """
    for dataset in sources:
        if (word := text_of(dataset, "ComplexImageComponent").upper()) in _GE_PARTS:
            return word
        if (tag := _GE_PART.tag_in(dataset, maker)) is not None and (number := number_of(dataset, tag, "SS")) in (
            1,
            2,
            3,
        ):
            return _GE_PARTS[int(number) - 1]
    return ""


def diffusion_directionality(sources: Sequence[Dataset], maker: str, image_type: Sequence[str]) -> str:
    """Return a frame's diffusion directionality: "none" (no diffusion weighting), "isotropic" (a mean over directions), "directional".

    An empty string if unknown. `sources` are the data sets that describe the frame, most specific first: its functional groups,
    then the data set of the file.
    """
    for dataset in sources:
        word = text_of(dataset, DIRECTIONALITY).upper() if DIRECTIONALITY in dataset else ""
        if word in ("NONE", "ISOTROPIC", "DIRECTIONAL", "BMATRIX"):
            return "directional" if word == "BMATRIX" else word.lower()
    for dataset in sources:
        for element, words in _PRIVATE_DIRECTION:
            if (tag := element.tag_in(dataset, maker)) is not None and (word := text_of(dataset, tag).upper()):
                return words.get(word, "directional")
    if any(_TRACE_TYPE.fullmatch(value) for value in image_type[2:]):
        return "isotropic"
    for dataset in sources:
        tags = [(ORIENTATION, "FD")] if ORIENTATION in dataset else []
        tags += [(tag, e.vr) for e in _PRIVATE_ORIENTATION if (tag := e.tag_in(dataset, maker)) is not None]
        for tag, vr in tags:
            if len(gradient := numbers_of(dataset, tag, vr)) == 3:
                return "directional" if any(gradient) else "isotropic"
    return ""


def numbers_of(dataset: Dataset, tag: BaseTag | int | str, vr: str = "DS") -> tuple[float, ...]:
    """Return the finite numbers of an element; `vr` gives the meaning of raw bytes. Empty if missing or invalid."""
    try:
        value = dataset[tag].value
        values = tuple(float(part) for part in _parts(value, vr, little=dataset.is_little_endian is not False))
    except MALFORMED:
        return ()
    return values if all(map(math.isfinite, values)) else ()


def number_of(dataset: Dataset, tag: BaseTag | int | str, vr: str = "DS") -> float | None:
    """Return the first number of an element; None if missing or invalid."""
    values = numbers_of(dataset, tag, vr)
    return values[0] if values else None


def text_of(dataset: Dataset, tag: BaseTag | int | str) -> str:
    """Return the text of an element, with several values joined by a backslash; empty if missing or unreadable."""
    return "\\".join(texts_of(dataset, tag))


def texts_of(dataset: Dataset, tag: BaseTag | int | str) -> tuple[str, ...]:
    """Return the values of an element as texts; empty if missing or unreadable."""
    try:
        value = dataset[tag].value
        parts = _parts(value, "LO", little=True)
        return tuple(str(part).replace("\0", "").strip() for part in parts)
    except MALFORMED:
        return ()


def items_of(dataset: Dataset, tag: BaseTag | int | str) -> Sequence[Dataset]:
    """Return the items of a sequence; empty if it is missing or not a sequence."""
    try:
        element = dataset[tag]
        return element.value if element.VR == "SQ" and element.value is not None else ()
    except MALFORMED:
        return ()


def _parts(value: Any, vr: str, *, little: bool) -> Iterator[Any]:
    """Yield the values of an element; bytes are decoded by value representation."""
    if isinstance(value, bytes) and vr in _BINARY:
        layout = ("<" if little else ">") + _BINARY[vr]
        yield from (number for (number,) in struct.iter_unpack(layout, value))
    elif isinstance(value, bytes):
        yield from (part for part in value.decode("latin-1").strip("\0 ").split("\\") if part.strip())
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        yield from (() if value is None or value == "" else (value,))
    else:
        yield from value
