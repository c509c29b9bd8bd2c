"""Parse the image behind each input channel of a network, e.g. "DWI", "adc", "DWI[-1]" (neighbouring slice), "FLAIR?" (optional)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ensemble.types import FloatArray, Modality

#: What dataset.json files call the modalities, in lower case and without prefixes and suffixes.
_NAMES = {
    "dwi": Modality.DWI,
    "diffusion": Modality.DWI,
    "b1000": Modality.DWI,
    "trace": Modality.DWI,
    "adc": Modality.ADC,
    "flair": Modality.FLAIR,
    "t2flair": Modality.FLAIR,
}
_SYNTAX = re.compile(r"(?P<name>[^\[\]?]+?)\s*(\[\s*(?P<offset>[+-]?\d+)\s*\])?\s*(?P<optional>\?)?")
#: "mri_DWI", "DWI-brain-mri", "DWI_0000"
_DECORATION = re.compile(r"^(mri|mr)[-_ ]+|[-_ ]+(brain[-_ ]+)?(mri|mr)$|_\d{4}$")


@dataclass(frozen=True)
class InputChannel:
    """One input channel of a network: a modality, or a neighbouring slice of it."""

    modality: Modality
    offset: int = 0
    """Slice offset along the first array axis: -1 is the previous slice."""
    optional: bool = False
    """Whether the network was trained to work without it; the channel is 0 if the case lacks the image."""


def parse_channel(text: str) -> InputChannel:
    """Parse NAME or NAME[offset], case-insensitive, with a trailing ? if optional. Raises ValueError for an unknown modality."""
    match = _SYNTAX.fullmatch(text.strip())
    name = _DECORATION.sub("", match["name"].lower()) if match else ""
    plain = re.sub(r"[-_ ]", "", name)
    if match is None or plain not in _NAMES:
        raise ValueError(f"channel {text!r} is not DWI, ADC or FLAIR")
    return InputChannel(_NAMES[plain], int(match["offset"] or 0), match["optional"] is not None)


def shift_slices(array: FloatArray, offset: int) -> FloatArray:
    """Return an array (z, y, x) shifted so that slice z shows slice z + `offset`; the end slices are repeated."""
    return array[np.clip(np.arange(len(array)) + offset, 0, len(array) - 1)]
