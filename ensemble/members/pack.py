"""Convert members of any kind to safetensors and JSON, without pickles and optimizer states.

A packed folder says in `member.json` what a manifest entry says, digests included, so that it is recognised wherever it is put.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ensemble.errors import UsageError, WeightsBroken
from ensemble.families.registry import family_of
from ensemble.families.spec import PACKED_MEMBER_FILE, MemberSpec
from ensemble.files import file_sha256
from ensemble.folders import exclusive_writer
from ensemble.members.manifest import MANIFEST, find_members, verify_files
from ensemble.publish import publish, write_json
from ensemble.weights.folder import convert_folder_errors
from ensemble.weights.onnx_form import write_onnx
from ensemble.weights.packed import PackedPrecision


def pack_members(
    source: Path,
    destination: Path,
    precision: PackedPrecision,
    names: tuple[str, ...] | None = None,
    *,
    onnx: bool = False,
) -> list[Path]:
    """Pack a member folder, or the members (all or the named ones) of a weights folder, into a new folder.

    A member folder becomes `destination` itself, the members of a weights folder become folders in it. A member folder named by a
    manifest beside it keeps its entry. With `onnx` each network is also written in ONNX form, as it is in the packed
    precision. Returns the packed folders; on failure nothing is left behind.

    Raises WeightsBroken for members that can't be read, UsageError when the destination is not empty.
    """
    specs = _beside(source) or find_members(source, names)
    alone = len(specs) == 1 and specs[0].folder.resolve() == source.resolve()
    places = ["." if alone else spec.name for spec in specs]
    with exclusive_writer(destination):
        if any(destination.iterdir()):
            raise UsageError(
                "the destination of a packed member must be new or empty",
                where=destination,
                found="a folder with files in it",
                do="give the name of a new folder",
            )
        with publish(destination) as staging:
            for spec, place in zip(specs, places, strict=True):
                _pack_member(spec, staging / place, precision, onnx)
    return [destination / place for place in places]


def _beside(source: Path) -> tuple[MemberSpec, ...]:
    """Return the manifest entry for a member folder from a weights folder above it."""
    with convert_folder_errors(source):
        above = [weights for weights in source.resolve().parents if (weights / MANIFEST).is_file()]
        if not above or (source / MANIFEST).is_file():
            return ()
        return tuple(spec for spec in find_members(above[0]) if spec.folder.resolve() == source.resolve())


def _pack_member(spec: MemberSpec, folder: Path, precision: PackedPrecision, onnx: bool) -> None:
    verify_files(spec)
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(spec)
    try:
        family.pack(spec.folder, folder, precision)
    except WeightsBroken as error:
        error.where = error.where or str(spec.folder)
        raise
    for network in family.networks(folder) if onnx else ():
        write_onnx(network.build(), network.channels, network.smallest_window, network.weights.parent, spec.folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    entry = replace(spec, sha256=digests).as_json()
    write_json(entry | {"precision": precision}, folder / PACKED_MEMBER_FILE)
