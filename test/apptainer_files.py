"""The definition file for Apptainer, taken apart."""

from __future__ import annotations

import re

from conftest import REPOSITORY


def definition() -> tuple[dict[str, str], dict[str, str]]:
    """Its header, and its sections by name."""
    head, *parts = re.split(r"^%(\w+)\n", (REPOSITORY / "deploy" / "apptainer.def").read_text(), flags=re.MULTILINE)
    header = dict(re.findall(r"^(\w+): (.+)$", head, re.MULTILINE))
    return header, dict(zip(parts[::2], parts[1::2], strict=True))
