"""Text from outside (names of folders, DICOM descriptions, what libraries say) as people may safely be shown it."""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Any

#: Control and format characters (escape sequences, bidirectional overrides, zero width), line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Zl", "Zp")
#: Looked up now: Python opens a file for it, of which there may be none left when the log must say so.
_escaped = codecs.getencoder("unicode_escape")
#: With what a cell begins that spreadsheets take for a formula.
_FORMULA = tuple(
    "=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)


class TrustedLines(str):
    """Text of several lines of ours, in which all that came from outside has been made visible."""


def visible(text: str, *, keep: str = "") -> str:
    """Text with nothing in it that acts instead of being seen: `\\x1b`, `\\n`, `\\u202e` are spelt out, but for those to be kept.

    Bytes of a file's name that are no UTF-8 (lone surrogates) become U+FFFD.
    """
    if text.isprintable():
        return text
    return "".join(one if one in keep else _spelt(one) for one in text)


def in_one_line(text: str) -> str:
    """Return what somebody says, visible, a space for its line breaks."""
    return visible(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))


def spreadsheet_cell(value: object) -> object:
    """Return what stands in a table for spreadsheets: numbers as they are, text visible and never a formula (an apostrophe is put before
    it).
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _spelt(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return _escaped(character)[0].decode("ascii") if kind in _UNSEEN else character


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes of a file's name that are none (Latin-1, say) reach Python as lone surrogates, and become
    U+FFFD.
    """
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def all_printable(content: Any) -> Any:
    """Return the same for every text, keys included, in what is to become JSON."""
    if isinstance(content, dict):
        return {all_printable(key): all_printable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [all_printable(value) for value in content]
    return printable(content) if isinstance(content, str) else content
