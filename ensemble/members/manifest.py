"""Find the members of a weights folder, and verify their files against the manifest.

A folder with a `manifest.json` says so itself; otherwise its layout is recognised (see `discovery.py`). Imports no torch: listing is cheap.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble.config import RunConfig
from ensemble.errors import UsageError, WeightsBroken
from ensemble.families import registry
from ensemble.families.base import InferenceSettings, Member, UnsupportedWeights
from ensemble.families.spec import PACKED_MEMBER_FILE, MemberSpec
from ensemble.files import error_in_words, lexists, read_json, size_in_words
from ensemble.members.discovery import discover_members, discover_unsupported, read_packed_entry
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.weights.digests import weights_sha256
from ensemble.weights.folder import convert_folder_errors, describe_weights_folder, weights_files

MANIFEST = "manifest.json"


def find_members(weights: Path, names: tuple[str, ...] | None = None) -> tuple[MemberSpec, ...]:
    """Return all members of a weights folder, in the order of the manifest or of their paths; or the named ones, in the order of `names`.

    Raises WeightsBroken when there is none, or when the manifest can't be read; UsageError when a name is unknown.
    """
    with convert_folder_errors(weights):
        if not weights.is_dir():
            raise WeightsBroken(
                "the weights folder does not exist", where=weights, do="give an existing folder with --weights"
            )
        manifest = weights / MANIFEST
        found = _from_manifest(manifest) if lexists(manifest) else discover_members(weights)
    if not found:
        others = ", ".join(f"{other.name} (not supported yet)" for other in find_unsupported(weights))
        *layouts, last = (f"with {what}" for what in (f"a {MANIFEST}", *(f.layout for f in registry.FAMILIES)))
        raise WeightsBroken(
            "the weights folder has no recognised member",
            where=weights,
            found=others or describe_weights_folder(weights),
            do=f"give a folder {', '.join(layouts)}, or {last}",
        )
    if names is None:
        return found
    by_name = {spec.name: spec for spec in found}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UsageError(
            f"no member is named {', '.join(unknown)}",
            where=weights,
            found=f"members: {', '.join(by_name)}",
            do="give names of these members in --members",
        )
    return tuple(by_name[name] for name in names)


def apply_member_defaults(config: RunConfig, specs: tuple[MemberSpec, ...]) -> RunConfig:
    """Fill in voting weights and smallest volumes (ml) from the members' manifest entries where the user chose none.

    None stays for the default rule (equal votes, all sizes). If members differ in a smallest volume, the smallest value is
    used. Raises UsageError for weights of members that are not used.
    """
    weights = config.member_weights
    if weights is None:
        weights = {spec.name: spec.weight for spec in specs}
    elif unknown := sorted(set(weights) - {spec.name for spec in specs}):
        raise UsageError(
            f"--member-weights names {', '.join(unknown)}, which is not among the members",
            found=f"members: {', '.join(spec.name for spec in specs)}",
            do="give weights only for these members, or let that one take part (--members)",
        )
    equal = len({weights.get(spec.name, 1.0) for spec in specs}) == 1
    least = config.min_lesion_ml
    if least is None:
        least = min(spec.min_lesion_ml for spec in specs)
    disputed = config.min_disputed_ml
    if disputed is None:
        disputed = min(spec.min_disputed_ml for spec in specs)
    chosen = None if equal else dict(weights)
    return replace(config, member_weights=chosen, min_lesion_ml=least or None, min_disputed_ml=disputed)


def find_unsupported(weights: Path) -> tuple[UnsupportedWeights, ...]:
    """Return recognised weights in a weights folder that are not supported yet; none if there is a manifest."""
    return () if lexists(weights / MANIFEST) else discover_unsupported(weights)


def open_member(spec: MemberSpec, settings: InferenceSettings) -> Member:
    """Load a member's networks onto the device. Raises WeightsBroken if its files are missing, damaged or altered."""
    verify_files(spec)
    try:
        return registry.family_of(spec).load(spec, settings)
    except Exception as error:
        if isinstance(error, WeightsBroken) or not is_out_of_memory(error):
            raise
        raise WeightsBroken(
            f"there is not enough memory to load member {spec.name}",
            where=spec.folder,
            found=f"weights of {size_in_words(*_weight_files(spec.folder).values())}; {error_in_words(error)[:150]}",
            do=MORE_MEMORY,
        ) from error


def verify_files(spec: MemberSpec, *, anew: bool = False) -> None:
    """Raise WeightsBroken if a file in the manifest is missing or altered, or if unlisted weights lie beside them.

    Cached digests of large files are not used if files are to be read `anew`.
    """
    present = _weight_files(spec.folder)
    holder = MANIFEST if spec.listed else f"the member's {PACKED_MEMBER_FILE}"
    if spec.sha256 and (added := sorted(set(present) - set(spec.sha256) - {PACKED_MEMBER_FILE})):
        raise WeightsBroken(
            f"member {spec.name} has files that {holder} does not list",
            where=spec.folder,
            found=", ".join(added),
            do=f"add their digests to {holder}, remove its sha256, or remove files that the member does not need",
        )
    for relative, expected in spec.sha256.items():
        path = spec.folder / relative
        if not path.is_file():
            raise WeightsBroken(f"a file of member {spec.name} is missing", where=path, do="restore the weights folder")
        if (digest := weights_sha256(path, anew=anew)) != expected:
            raise WeightsBroken(
                f"a file of member {spec.name} does not match its recorded SHA-256",
                where=path,
                found=f"sha256 {digest}, expected {expected}",
                do=f"restore the file; if you changed it on purpose, update its digest in {holder}",
            )


def weight_digests(spec: MemberSpec) -> dict[str, str]:
    """Return the SHA-256 of every file that affects what the member predicts. Raises WeightsBroken."""
    return dict(spec.sha256) or {name: weights_sha256(path) for name, path in _weight_files(spec.folder).items()}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return the files in a member's folder that affect what it predicts, by path. Raises WeightsBroken."""
    suffixes = registry.weight_suffixes()
    with convert_folder_errors(folder):
        found = [path for path in weights_files(folder) if path.suffix in suffixes and path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def _from_manifest(manifest: Path) -> tuple[MemberSpec, ...]:
    try:
        entries = read_json(manifest)["members"]
        specs = tuple(_of_manifest(entry, _inside(manifest.parent, str(entry["folder"]))) for entry in entries)
        if len({spec.name.lower() for spec in specs}) < len(specs):  # some file systems know no capitals
            raise ValueError("two members have the same name")
        return specs
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "the weights manifest can't be read",
            where=manifest,
            found=error_in_words(error),
            do="correct or restore it",
        ) from error


def _inside(weights: Path, folder: str) -> Path:
    if not (weights / folder).resolve().is_relative_to(weights.resolve()):
        raise ValueError(f"the folder {folder!r} lies outside the weights folder")
    return weights / folder


def _of_manifest(entry: dict[str, Any], folder: Path) -> MemberSpec:
    """Return a member from its manifest entry; for packed members, missing fields come from their own description."""
    return replace(MemberSpec.from_json(read_packed_entry(folder) | entry, folder), listed=bool(entry.get("sha256")))
