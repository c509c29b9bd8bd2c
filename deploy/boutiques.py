"""The program as a Boutiques descriptor, made of its own options: `python -m deploy.boutiques > deploy/boutiques.json`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.options import BIDS_APP, command_parser

_ERRORS = {
    2: "wrong usage, or the output folder can't be written",
    3: "input refused, or (group) cases that are not done",
    4: "weights missing or broken",
    5: "too few members voted",
    137: "out of memory",
    1: "a bug",
}


def descriptor() -> dict[str, Any]:
    """Return the descriptor (schema 0.5)."""
    inputs = [entry for action in command_parser(BIDS_APP)._actions if (entry := _input(action)) is not None]
    keys = " ".join(entry["value-key"] for entry in inputs)
    outputs = (
        ("results", "Results", "[OUT]", "BIDS derivatives: a folder a case"),
        ("table", "Table of the cases", "[OUT]/summary.csv", "Written by the level group"),
        ("page", "Page of the cases", "[OUT]/index.html", "Written by the level group"),
    )
    return {
        "name": "isles-ensemble",
        "tool-version": __version__,
        "schema-version": "0.5",
        "description": "Ischemic stroke lesions segmented in DWI, ADC and FLAIR by an ensemble. For research only. Not a medical device.",
        "command-line": f"python /opt/app/process.py {keys}",
        "container-image": {"type": "docker", "image": f"isles-ensemble:{__version__}", "entrypoint": True},
        "inputs": inputs,
        "output-files": [
            {"id": id_, "name": name, "path-template": path, "description": about, "optional": id_ != "results"}
            for id_, name, path, about in outputs
        ],
        "error-codes": [{"code": code, "description": about} for code, about in _ERRORS.items()],
        "tags": {"domain": ["neuroinformatics", "bids-app", "mri"]},
    }


def _input(action: argparse.Action) -> dict[str, Any] | None:
    """Return how an option or argument is given; None for `--help`."""
    if action.dest == "help":
        return None
    kind = "Flag" if action.nargs == 0 else "Number" if action.type in (int, float) else "String"
    kind = "File" if action.type is Path and action.dest != "out" else kind
    about = " ".join((action.help or "").replace("%%", "%").split())
    on = action.nargs == 0 and bool(getattr(action, "fallback", False))  # given to be switched off
    entry: dict[str, Any] = {
        "id": "no_" * on + action.dest,
        "name": (action.metavar if not action.option_strings else None) or action.dest.replace("_", " "),
        "type": kind,
        "value-key": f"[{action.dest.upper()}]",
        "optional": bool(action.option_strings),
        "description": about,
    }
    if action.choices is not None:
        entry["value-choices"] = list(action.choices)
    if action.option_strings:
        entry["command-line-flag"] = f"--no-{action.option_strings[0][2:]}" if on else action.option_strings[0]
    if action.nargs == "+":
        entry |= {"list": True, "min-list-entries": 1}
    return entry


if __name__ == "__main__":
    json.dump(descriptor(), sys.stdout, indent=2)
    sys.stdout.write("\n")
