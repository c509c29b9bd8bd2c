"""Building blocks of pages: templates, scripts with their security policy, data, and sheets of slices."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ensemble.text import escape_invisible
from ensemble.types import AnyArray


def grey_levels(array: AnyArray, window: tuple[float, float]) -> AnyArray:
    """Return an array as uint8, with the ends of a window mapped to black and white."""
    low, high = window
    return np.asarray(np.clip((array - low) / (high - low) * 255, 0, 255).astype(np.uint8))


def sheet_columns(slices: int) -> int:
    """Return the number of columns of a sheet of slices."""
    return math.ceil(math.sqrt(slices))


def slice_sheet(stack: AnyArray, *, lossless: bool) -> str:
    """Return slices (z, y, x) or (z, y, x, 3) uint8 as one picture (data URI), in rows of `sheet_columns`."""
    columns = sheet_columns(len(stack))
    missing = -len(stack) % columns
    padded = np.concatenate([stack, np.zeros((missing, *stack.shape[1:]), stack.dtype)])
    tiles = padded.reshape(-1, columns, *stack.shape[1:]).swapaxes(1, 2)
    picture = Image.fromarray(
        tiles.reshape(tiles.shape[0] * stack.shape[1], columns * stack.shape[2], *stack.shape[3:])
    )
    content, kind = io.BytesIO(), "png" if lossless else "jpeg"
    picture.save(content, kind, **({"optimize": False, "compress_level": 6} if lossless else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


_TEMPLATES = Path(__file__).resolve().parent / "templates"


@cache
def page_template(name: str) -> Any:
    """Return the template of a page, by file name."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Return the text of a template expression with invisible characters escaped, so that it can't reorder the text around it."""
    return escape_invisible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def page_script(*names: str) -> dict[str, str]:
    """Return what a page's template needs: its script (the files `names`, joined), its style, and a content security policy.

    The policy allows just these two.
    """
    script = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    allowed = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    ]
    policy = f"default-src 'none'; img-src data:; script-src {allowed[0]}; style-src {allowed[1]}"
    return {"script": script, "style": style, "policy": policy}


def script_safe_json(content: Any) -> str:
    """Write JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(content, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
