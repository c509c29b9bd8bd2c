"""Interpret the names of image files. Imports no image library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.types import Modality

#: Kinds of image that are read, by the file name's ending in lower case. Of these a truncated file is known to be noticed.
IMAGE_SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr")
#: Kind of file that may hold DICOM slices, and the endings of single ones; those without are known by their first bytes.
ARCHIVE, SLICE_SUFFIXES = ".zip", (".dcm", ".ima")

#: Words that state what an image shows, in lower case; and words before which they have another meaning.
_FLAIR, _ADC, _DWI = {"flair", "t2flair"}, {"adc", "adcmap"}, re.compile(r"dwi|tracew?|(dwi)?b=?\d+|dwi\d{3,4}|isodwi")
_NO_IMAGE = {"exp", "exponential", "phase", "pha", "imag", "imaginary"}
#: Values of BIDS entities: parts of a complex signal; maps derived from a DWI; other properties of a DWI.
_MAGNITUDE, _MAP = ("mag", "magnitude"), re.compile(r"(col|colou?r)?FA|e(xp)?ADC|exp|MD|tensor|S0", re.IGNORECASE)
_ABOUT_ADC = re.compile("^adc|adc$|(?-i:ADC)", re.IGNORECASE)
_ABOUT_DWI = re.compile(r"adc|trace|(?<![a-z])b\d+", re.IGNORECASE)
_B = re.compile(r"(?:(?<![A-Za-z])b=?|dwib?)(\d+)", re.IGNORECASE)


def image_suffix(path: Path) -> str:
    """Return the suffix of an image file in lower case; empty if it is not a supported format."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), "")


def stem(path: Path) -> str:
    """Return a file name without the image suffix: `a.nii.gz` -> `a`."""
    ending = image_suffix(path) or path.suffix
    return path.name[: -len(ending)] if ending else path.name


@dataclass(frozen=True)
class ParsedName:
    """What an image's file name states."""

    modality: Modality
    case: str
    """The name without the words that state what the image shows; it identifies the subject."""
    b: float | None = None
    """The b-value of a DWI, s/mm^2, where it names a single one."""
    trace: bool = False
    """Whether a DWI is called a mean over directions."""
    derived: bool = False
    """Whether something was done with the image since it was acquired (BIDS: space-, desc-)."""


def parse_image_name(name: str) -> ParsedName | None:
    """Parse a file name without suffix; return None unless it names a DWI, ADC or FLAIR.

    The last words count (`17_dwi_b1000`, `17_ADC_map`); in a BIDS name also the entities (`sub-1_rec-ADC_dwi`). None for other maps,
    phase images, and names that state no modality.
    """
    separators = "(_+)" if name.startswith("sub-") else r"([_\-. ]+)"
    pieces = re.split(separators, name)
    words: list[str] = []
    while pieces and _belongs(pieces[-1].lower(), words):
        words.append(pieces.pop().lower())
        case = "".join(pieces[:-1])
        pieces = pieces[:-1]
    if not words or words == ["map"] or (pieces and pieces[-1].lower() in _NO_IMAGE):
        return None
    said = dict(part.split("-", 1) for part in case.split("_") if "-" in part) if name.startswith("sub-") else {}
    about = [said[key] for key in ("acq", "rec", "desc") if key in said]
    if said.get("part", "mag").lower() not in _MAGNITUDE or any(_MAP.fullmatch(value) for value in about):
        return None
    derived = "space" in said or ("desc" in said and not _ABOUT_DWI.search(said["desc"]))
    if any(word in _FLAIR for word in words):
        return ParsedName(Modality.FLAIR, case, derived=derived)
    if any(word in _ADC for word in words) or any(_ABOUT_ADC.search(value) for value in about):
        return ParsedName(Modality.ADC, case, derived=derived)
    b_values = [float(digits) for text in (*words, *about) for digits in _B.findall(text)]
    b = b_values[0] if len(set(b_values)) == 1 else None
    trace = any("trace" in text.lower() for text in (*words, *about))
    return ParsedName(Modality.DWI, case, b, trace, derived)


def _belongs(word: str, taken: Sequence[str]) -> bool:
    """Return whether a word describes the image, given the words taken after it (the name is parsed from its end)."""
    if any(behind in _FLAIR for behind in taken):
        return word == "t2"
    if not taken:
        return word == "map" or word in _FLAIR or word in _ADC or bool(_DWI.fullmatch(word))
    if taken == ["map"]:
        return word in _ADC
    return word in _ADC or bool(_DWI.fullmatch(word) and not word.startswith("b"))  # b1234_dwi may be of patient b1234
