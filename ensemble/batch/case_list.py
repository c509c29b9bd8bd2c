"""What one search of a dataset has found, as a file: the tasks of a job array read it instead of searching again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ensemble.batch.layouts import FoundCase
from ensemble.errors import InputRefused
from ensemble.files import open_file, parse_json, unreadable_reason
from ensemble.program import command_line
from ensemble.publish import write_bytes_atomically
from ensemble.types import Modality

_FORMAT = "isles-ensemble case list"
_VERSION = 1
_REFUSAL = ("what", "where", "found", "do")


@dataclass(frozen=True)
class CaseList:
    """A case list on disk. Its file name contains a digest of its cases, so a new list never replaces one that a queued job will read."""

    path: Path
    searched: str
    """When the dataset was searched (UTC)."""


def write_case_list(cases: Sequence[FoundCase], dataset: Path, folder: Path) -> CaseList:
    """Write what a search of `dataset` has found into `folder`: one JSON line about the list, then one per case. Raises OSError."""
    root = dataset.resolve()
    body = "".join(json.dumps(_as_json(case, root)) + "\n" for case in cases).encode()
    digest, searched = hashlib.sha256(body).hexdigest(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = {
        "format": _FORMAT,
        "version": _VERSION,
        "dataset": str(dataset.absolute()),
        "searched": searched,
        "sha256": digest,
    }
    path = folder / f"cases-{digest[:12]}.jsonl"
    write_bytes_atomically(path, json.dumps(head).encode() + b"\n" + body, folder)
    return CaseList(path, searched)


def read_case_list(path: Path, dataset: Path) -> tuple[FoundCase, ...]:
    """Return the cases of a list, sorted by name as a search gives them, with the time when they were found (`listed`).

    Raises InputRefused if the list can't be read, is damaged or of another dataset; also if the dataset is not there or empty, as on a
    machine that has not mounted it, which is no fault of any case.
    """
    first, body = _lines(path)
    head = _head(first)
    if head.get("format") != _FORMAT:
        raise _refused("the file is no list of cases, or is damaged", path, "its first line names none")
    if (version := head.get("version")) != _VERSION:
        raise _refused(
            "another version of the program has written the list of cases", path, f"format {version}, not {_VERSION}"
        )
    if hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise _refused("the list of cases is damaged, or was changed", path, "another SHA-256 than its first line says")
    _refuse_absent(dataset)
    root = dataset.resolve()
    if root != Path(head["dataset"]).resolve():  # both here: links may lead elsewhere where the list was written
        raise _refused("the list of cases is of another dataset", path, f"{head['dataset']}, not {root}")
    return tuple(_as_case(json.loads(line), root, head["searched"]) for line in body.splitlines())


def _lines(path: Path) -> tuple[bytes, bytes]:
    """Return the first line of a list, and the others. Raises InputRefused."""
    try:
        with open_file(path) as file:
            return file.readline(), file.read()
    except OSError as error:
        why = unreadable_reason(path, error)
        raise _refused("the list of cases can't be read", path, why.said, why.do) from error


def _refused(what: str, path: Path, found: str, do: str = "") -> InputRefused:
    return InputRefused(what, where=path, found=found, do="; or ".join(filter(None, (do, search_again_advice()))))


def search_again_advice() -> str:
    """Return the advice for a list that is out of date."""
    return f"search the dataset again: {command_line('slurm DATASET OUT')}"


def _refuse_absent(dataset: Path) -> None:
    """Raise InputRefused if the dataset is gone; otherwise each of its cases would fail."""
    try:
        with os.scandir(dataset) as entries:
            why = "it is empty" if next(entries, None) is None else ""
    except OSError as error:
        why = unreadable_reason(dataset, error).said
    if why:
        do = "check the path, and that this machine has mounted it (it held cases when it was searched)"
        raise InputRefused("the dataset can't be read", where=dataset, found=why, do=do)


def _head(line: bytes) -> Mapping[str, Any]:
    """Return the first line of a list; nothing if it is no JSON object."""
    try:
        head = parse_json(line.decode())
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def _as_json(case: FoundCase, root: Path) -> dict[str, Any]:
    """Return a case as JSON data, without empty fields."""
    problem = case.problem and {**{name: getattr(case.problem, name) for name in _REFUSAL}, "notes": case.problem.notes}
    files = {modality: str(path.relative_to(root)) for modality, path in case.files.items()}
    content = {"name": case.name, "files": files, "notes": dict(case.notes), "problem": problem}
    return {name: value for name, value in content.items() if value}


def _as_case(content: Mapping[str, Any], root: Path, searched: str) -> FoundCase:
    problem = None
    if said := content.get("problem"):
        problem = InputRefused(said["what"], **{name: said[name] for name in _REFUSAL[1:]})
        problem.notes = tuple(said["notes"])
    return FoundCase(
        content["name"],
        {Modality(name): root / path for name, path in content.get("files", {}).items()},
        problem,
        {Modality(name): note for name, note in content.get("notes", {}).items()},
        listed=searched,
    )
