"""Which members a weights folder holds, where their files are, and whether they are the files that were published.

A folder with a `manifest.json` says so itself; otherwise its layout is recognised. Imports no torch: listing members is cheap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ensemble.errors import UsageError, WeightsBroken
from ensemble.members.base import InferenceSettings, Member

MANIFEST = "manifest.json"

#: kind -> module and class that opens it; imported only when a member of the kind is opened, since it brings torch.
_KINDS = {"nnunet": ("ensemble.members.nnunet", "NnunetMember")}


@dataclass(frozen=True)
class MemberSpec:
    """One member, as the manifest describes it."""

    name: str
    """The name it votes under."""
    kind: str
    """How its files are read: a key of `_KINDS`."""
    folder: Path
    """Where its files are."""
    channels: tuple[str, ...] | None = None
    """What each input channel shows, for example ("DWI", "ADC", "DWI[-1]"); None means that its own files say so."""
    intensities: Literal["native", "physical"] = "native"
    """Whether it wants images as read, or tissue-normalised ones (see `prepare/units.py`)."""
    orientation: Literal["native", "canonical"] = "native"
    """Whether arrays are brought to the nearest LPS axes before the networks, and back afterwards."""
    spacing_mm: tuple[float, ...] = ()
    """Voxel spacing (z, y, x) or in-plane (y, x) that its networks work at; empty when its own files say so."""
    licence: str = ""
    """SPDX identifier of the weights' licence."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digest of each file, by path relative to the folder; files of unknown origin have none."""


def find_members(weights: Path, names: tuple[str, ...] | None = None) -> tuple[MemberSpec, ...]:
    """The members in a weights folder, in its own order; or those named, in the order of naming.

    Raises WeightsBroken when there is none, or when the manifest can't be read; UsageError when a name is unknown.
    """
    if not weights.is_dir():
        raise WeightsBroken(
            "the weights folder does not exist", where=weights, do="point --weights to an existing folder"
        )
    manifest = weights / MANIFEST
    found = _from_manifest(manifest) if manifest.is_file() else _from_layout(weights)
    if not found:
        raise WeightsBroken(
            "no member weights were recognised",
            where=weights,
            found=_listing(weights),
            do=f"give a folder with a {MANIFEST}, or with nnU-Net v2 model folders"
            " (dataset.json, plans.json, fold_*/checkpoint_final.pth)",
        )
    if names is None:
        return found
    by_name = {spec.name: spec for spec in found}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UsageError(
            f"no member is named {', '.join(unknown)}", where=weights, found=f"members: {', '.join(by_name)}"
        )
    return tuple(by_name[name] for name in names)


def open_member(spec: MemberSpec, settings: InferenceSettings) -> Member:
    """Load a member's networks onto the device. Raises WeightsBroken when its files are missing, damaged or altered."""
    verify_files(spec)
    try:
        module, name = _KINDS[spec.kind]
    except KeyError:
        raise WeightsBroken(
            f"member {spec.name} is of unknown kind {spec.kind!r}",
            where=spec.folder,
            found=f"known: {', '.join(_KINDS)}",
        ) from None
    opened: Member = getattr(import_module(module), name).load(spec, settings)
    return opened


def verify_files(spec: MemberSpec) -> None:
    """Raise WeightsBroken unless each file that the manifest lists is there, unaltered."""
    for relative, expected in spec.sha256.items():
        path = spec.folder / relative
        if not path.is_file():
            raise WeightsBroken(f"a file of member {spec.name} is missing", where=path, do="restore the weights folder")
        if (digest := file_sha256(path)) != expected:
            raise WeightsBroken(
                f"a file of member {spec.name} is not the one that was published",
                where=path,
                found=f"sha256 {digest}, expected {expected}",
                do=f"restore the file; if you changed it on purpose, update its digest in {MANIFEST}",
            )


def weight_digests(spec: MemberSpec) -> dict[str, str]:
    """Digest of every file that determines what the member predicts, for the run report."""
    return dict(spec.sha256) or {
        path.relative_to(spec.folder).as_posix(): file_sha256(path)
        for path in sorted(spec.folder.rglob("*"))
        if path.is_file()
        and path.suffix in {".json", ".pth", ".pkl", ".model", ".ts", ".ckpt", ".onnx", ".safetensors"}
    }


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_manifest(manifest: Path) -> tuple[MemberSpec, ...]:
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["members"]
        return tuple(_spec(entry, manifest.parent) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsBroken(
            "the weights manifest can't be read",
            where=manifest,
            found=f"{type(error).__name__}: {error}",
            do="restore the file",
        ) from error


def _spec(entry: dict[str, Any], weights: Path) -> MemberSpec:
    channels = entry.get("channels")
    return MemberSpec(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        folder=weights / str(entry["folder"]),
        channels=tuple(channels) if channels is not None else None,
        intensities=_choice(entry, "intensities", ("native", "physical")),
        orientation=_choice(entry, "orientation", ("native", "canonical")),
        spacing_mm=tuple(float(mm) for mm in entry.get("spacing_mm", ())),
        licence=str(entry.get("licence", "")),
        sha256=dict(entry.get("sha256", {})),
    )


def _choice(entry: dict[str, Any], key: str, allowed: tuple[str, str]) -> Any:
    value = entry.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(allowed)}")
    return value


def _from_layout(weights: Path) -> tuple[MemberSpec, ...]:
    """nnU-Net v2 model folders: the weights folder itself, or any folder below it."""
    folders = sorted(path.parent for path in weights.rglob("plans.json") if (path.parent / "dataset.json").is_file())
    return tuple(MemberSpec(_name_of(folder, weights), "nnunet", folder) for folder in folders)


def _name_of(folder: Path, weights: Path) -> str:
    return weights.name if folder == weights else folder.relative_to(weights).as_posix()


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "an empty folder"
