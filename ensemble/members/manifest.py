"""Which members a weights folder holds, where their files are, and whether they are the files that were published.

A folder with a `manifest.json` says so itself; otherwise its layout is recognised (see `discovery.py`). Imports no torch: listing is cheap.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble.config import RunConfig
from ensemble.errors import UsageError, WeightsBroken
from ensemble.families import registry
from ensemble.families.base import InferenceSettings, Member, Unsupported
from ensemble.families.spec import PACKED, MemberSpec
from ensemble.files import lexists, read_json
from ensemble.members.discovery import members_by_folder_layout, packed_entry, unsupported_by_folder_layout
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.weights.digests import weights_sha256
from ensemble.weights.folder import files_of, listing, readable

MANIFEST = "manifest.json"


def find_members(weights: Path, names: tuple[str, ...] | None = None) -> tuple[MemberSpec, ...]:
    """Return the members in a weights folder, in its own order; or those named, in the order of naming.

    Raises WeightsBroken when there is none, or when the manifest can't be read; UsageError when a name is unknown.
    """
    with readable(weights):
        if not weights.is_dir():
            raise WeightsBroken(
                "the weights folder does not exist", where=weights, do="point --weights to an existing folder"
            )
        manifest = weights / MANIFEST
        found = _from_manifest(manifest) if lexists(manifest) else members_by_folder_layout(weights)
    if not found:
        others = ", ".join(f"{other.name} (not supported yet)" for other in find_unsupported(weights))
        *layouts, last = (f"with {what}" for what in (f"a {MANIFEST}", *(f.layout for f in registry.FAMILIES)))
        raise WeightsBroken(
            "no member weights were recognised",
            where=weights,
            found=others or listing(weights),
            do=f"give a folder {', '.join(layouts)}, or {last}",
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


def settled(config: RunConfig, specs: tuple[MemberSpec, ...]) -> RunConfig:
    """Return a run's choices with what the members' own entries say of votes and small lesions, where nothing was chosen.

    None stays where that is the usual rule: equal votes, every size. Of members that differ about the smallest lesion, the one that keeps
    most is followed. Raises UsageError for weights of members that don't take part.
    """
    weights = config.member_weights
    if weights is None:
        weights = {spec.name: spec.weight for spec in specs}
    elif unknown := sorted(set(weights) - {spec.name for spec in specs}):
        raise UsageError(
            f"--member-weights names {', '.join(unknown)}, which takes no part",
            found=f"members: {', '.join(spec.name for spec in specs)}",
        )
    equal = len({weights.get(spec.name, 1.0) for spec in specs}) == 1
    least = config.min_lesion_ml
    if least is None:
        least = min(spec.min_lesion_ml for spec in specs)
    return replace(config, member_weights=None if equal else dict(weights), min_lesion_ml=least or None)


def find_unsupported(weights: Path) -> tuple[Unsupported, ...]:
    """Return known weights in a weights folder that can't be used yet; none where a manifest says what is to be used."""
    return () if lexists(weights / MANIFEST) else unsupported_by_folder_layout(weights)


def open_member(spec: MemberSpec, settings: InferenceSettings) -> Member:
    """Load a member's networks onto the device. Raises WeightsBroken when its files are missing, damaged or altered."""
    verify_files(spec)
    try:
        return registry.family_of(spec).load(spec, settings)
    except Exception as error:
        if isinstance(error, WeightsBroken) or not is_out_of_memory(error):
            raise
        raise WeightsBroken(
            f"there is not enough memory to load member {spec.name}",
            where=spec.folder,
            found=str(error)[:200],
            do=MORE_MEMORY,
        ) from error


def verify_files(spec: MemberSpec, *, anew: bool = False) -> None:
    """Raise WeightsBroken unless each file that the manifest lists is there, unaltered, and no other weights lie beside them.

    Large files that are as they were when they were hashed last are hashed `anew` only if that is asked for.
    """
    present = _weight_files(spec.folder)
    if spec.sha256 and (added := sorted(set(present) - set(spec.sha256) - {PACKED})):
        raise WeightsBroken(
            f"member {spec.name} has files that {MANIFEST} does not list",
            where=spec.folder,
            found=", ".join(added),
            do=f"list them with their digests in {MANIFEST}, or leave sha256 out; remove those that the member doesn't need",
        )
    for relative, expected in spec.sha256.items():
        path = spec.folder / relative
        if not path.is_file():
            raise WeightsBroken(f"a file of member {spec.name} is missing", where=path, do="restore the weights folder")
        if (digest := weights_sha256(path, anew=anew)) != expected:
            raise WeightsBroken(
                f"a file of member {spec.name} is not the one that was published",
                where=path,
                found=f"sha256 {digest}, expected {expected}",
                do=f"restore the file; if you changed it on purpose, update its digest in {MANIFEST}",
            )


def weight_digests(spec: MemberSpec) -> dict[str, str]:
    """Return the digest of every file that determines what the member predicts, for the run report. Raises WeightsBroken."""
    return dict(spec.sha256) or {name: weights_sha256(path) for name, path in _weight_files(spec.folder).items()}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return the files of a member's folder that bear on what it predicts, by path. Raises WeightsBroken for what can't be read."""
    suffixes = registry.weight_suffixes()
    with readable(folder):
        found = [path for path in files_of(folder) if path.suffix in suffixes and path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def _from_manifest(manifest: Path) -> tuple[MemberSpec, ...]:
    try:
        entries = read_json(manifest)["members"]
        specs = tuple(_of_manifest(entry, _inside(manifest.parent, str(entry["folder"]))) for entry in entries)
        if len({spec.name.lower() for spec in specs}) < len(specs):  # some file systems know no capitals
            raise ValueError("two members have the same name, and only one of them could vote")
        return specs
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "the weights manifest can't be read",
            where=manifest,
            found=f"{type(error).__name__}: {error}",
            do="mend or restore the file",
        ) from error


def _inside(weights: Path, folder: str) -> Path:
    if not (weights / folder).resolve().is_relative_to(weights.resolve()):
        raise ValueError(f"the folder {folder!r} lies outside the weights folder")
    return weights / folder


def _of_manifest(entry: dict[str, Any], folder: Path) -> MemberSpec:
    """Return what the manifest says of a member; what it leaves open of a packed one, that says itself."""
    return replace(MemberSpec.from_json(packed_entry(folder) | entry, folder), listed=bool(entry.get("sha256")))
