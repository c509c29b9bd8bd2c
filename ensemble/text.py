"""Make text from outside (folder names, DICOM descriptions, messages of libraries) safe to show."""

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
    """Multi-line text of this program, in which all text from outside has been escaped."""


def escape_invisible(text: str, *, keep: str = "") -> str:
    """Return text with control and invisible characters escaped (`\x1b`, `\n`, `\u202e`), except those in `keep`.

    Bytes of a file's name that are no UTF-8 (lone surrogates) become U+FFFD.
    """
    if text.isprintable():
        return text
    return "".join(one if one in keep else _spelt(one) for one in text)


def escape_to_one_line(text: str) -> str:
    """Return text escaped by `escape_invisible`, with line breaks replaced by spaces."""
    return escape_invisible(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))


def spreadsheet_cell(value: object) -> object:
    """Return a safe spreadsheet cell: numbers unchanged; text escaped and, if it looks like a formula, prefixed by an apostrophe."""
    if not isinstance(value, str):
        return value
    text = escape_invisible(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _spelt(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return _escaped(character)[0].decode("ascii") if kind in _UNSEEN else character


def replace_undecodable(text: str) -> str:
    """Return text that UTF-8 can encode: undecodable bytes of file names (lone surrogates in Python) become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def replace_undecodable_in_json(content: Any) -> Any:
    """Apply `replace_undecodable` to every text in JSON data, keys included."""
    if isinstance(content, dict):
        return {replace_undecodable_in_json(key): replace_undecodable_in_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [replace_undecodable_in_json(value) for value in content]
    return replace_undecodable(content) if isinstance(content, str) else content
