"""Images named by nnU-Net's convention: `case_0000.nii.gz`, with a `dataset.json` that names the modality of each channel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused
from ensemble.families.channels import parse_channel
from ensemble.files import error_in_words, read_json
from ensemble.readers.names import ParsedName, image_suffix, parse_image_name, stem
from ensemble.types import Modality

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_DESCRIPTION = "dataset.json"
#: Advice if nothing states which modality such names stand for.
NEEDS_DESCRIPTION = f"add nnU-Net's {_DESCRIPTION}, whose channel_names say what _0000, _0001 and so on show"


class ChannelNames:
    """The channel names of nnU-Net datasets in a folder tree. Each `dataset.json` is read once, when first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, Mapping[int, Modality]] = {}

    def named(self, path: Path) -> ParsedName | None:
        """Return the image that a file holds; None if its name or its channel does not tell the modality.

        Raises InputRefused for a damaged `dataset.json`.
        """
        match = parse_nnunet_name(path)
        if match is None:
            return None
        modality = self._of(path.parent).get(int(match["channel"]))
        return ParsedName(modality, match["case"]) if modality else None

    def _of(self, folder: Path) -> Mapping[int, Modality]:
        """Return the channel names for images in a folder: from the nearest `dataset.json`, at most one folder above the root."""
        if folder not in self._known:
            own = _described(folder / _DESCRIPTION)
            above = folder not in (self._root.parent, folder.parent)
            self._known[folder] = own if own is not None else self._of(folder.parent) if above else {}
        return self._known[folder]


def parse_nnunet_name(path: Path) -> re.Match[str] | None:
    """Match a file name of nnU-Net's convention: the groups are case name and channel number. None for other names."""
    return _CHANNEL.fullmatch(stem(path)) if image_suffix(path) else None


def _described(path: Path) -> Mapping[int, Modality] | None:
    """Return the channels of a `dataset.json` that are DWI, ADC or FLAIR; None if the file is not nnU-Net's.

    Version 1 calls the table `modality`. Raises InputRefused.
    """
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"{_DESCRIPTION} can't be read",
            where=path,
            found=error_in_words(error),
            do="restore it: it names the modalities of the images _0000, _0001 beside or below it",
        ) from error
    names = content.get("channel_names", content.get("modality")) if isinstance(content, dict) else None
    if not isinstance(names, dict):
        return None
    return {
        int(key): modality
        for key, name in names.items()
        if str(key).isdecimal() and (modality := _modality(str(name))) is not None
    }


def _modality(channel: str) -> Modality | None:
    named = parse_image_name(channel.strip().removesuffix("?"))
    if named is not None:
        return named.modality
    try:
        channel_shown = parse_channel(channel)
    except ValueError:
        return None
    return channel_shown.modality if channel_shown.offset == 0 else None
