"""What pages are put together from: templates, scripts that their policy allows, data, sheets of slices."""

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

from ensemble.text import visible
from ensemble.types import AnyArray


def grey_levels(array: AnyArray, window: tuple[float, float]) -> AnyArray:
    """Return an array as uint8, black and white at the ends of a window."""
    low, high = window
    return np.asarray(np.clip((array - low) / (high - low) * 255, 0, 255).astype(np.uint8))


def sheet_columns(slices: int) -> int:
    """Return how many slices lie side by side in a sheet."""
    return math.ceil(math.sqrt(slices))


def sheet(stack: AnyArray, *, lossless: bool) -> str:
    """Lay slices (z, y, x) or (z, y, x, 3) uint8 side by side in rows of `sheet_columns`, as a data URI."""
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
def template(name: str) -> Any:
    """Return a template of a page, by its file."""
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
    """Return what stands in for an expression of a template: text from outside can't reorder what stands around it."""
    return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def page_script(*names: str) -> dict[str, str]:
    """Return a page's script, put together from files, and style, and what its content security policy allows: these and nothing else."""
    script = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    allowed = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    ]
    policy = f"default-src 'none'; img-src data:; script-src {allowed[0]}; style-src {allowed[1]}"
    return {"script": script, "style": style, "policy": policy}


def json_text(content: Any) -> str:
    """Write JSON that may stand inside a script element, whatever its strings hold."""
    text = json.dumps(content, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
