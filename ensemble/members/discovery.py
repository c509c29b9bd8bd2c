"""Find members in a weights folder without a manifest: packed members, and folders whose layout a family recognises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble.errors import WeightsBroken
from ensemble.families import registry
from ensemble.families.base import UnsupportedWeights
from ensemble.families.names import make_names_unique
from ensemble.families.spec import PACKED_MEMBER_FILE, MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.files import error_in_words, lexists, read_json
from ensemble.program import command_line
from ensemble.weights.folder import convert_folder_errors


def discover_members(weights: Path) -> tuple[MemberSpec, ...]:
    """Return the members in or below a weights folder, in the order of their paths. Raises WeightsBroken."""
    tree = WeightsTree.read(weights)
    found = {path.parent: read_packed_member(path) for path in tree.named(PACKED_MEMBER_FILE)}
    for thing in _recognised(tree):
        if isinstance(thing, MemberSpec):
            found.setdefault(thing.folder, thing)
    folders = sorted(found)
    often = Counter(spec.name.lower() for spec in found.values())
    own = [found[folder].name for folder in folders]
    names = [name if often[name.lower()] == 1 else tree.name_of(at) for name, at in zip(own, folders, strict=True)]
    told = make_names_unique(names, [folder.relative_to(weights).as_posix() for folder in folders])
    return tuple(replace(found[folder], name=name) for folder, name in zip(folders, told, strict=True))


def discover_unsupported(weights: Path) -> tuple[UnsupportedWeights, ...]:
    """Return recognised weights below a folder that are not supported yet. Raises WeightsBroken."""
    return tuple(thing for thing in _recognised(WeightsTree.read(weights)) if isinstance(thing, UnsupportedWeights))


def read_packed_member(path: Path) -> MemberSpec:
    """Return the member described by a packed folder's `member.json`. Raises WeightsBroken."""
    try:
        return MemberSpec.from_json(read_packed_entry(path.parent), path.parent)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "the description of a packed member can't be read",
            where=path,
            found=error_in_words(error),
            do=f"make the folder again from the original weights: {command_line('members pack SRC DST')}",
        ) from error


def read_packed_entry(folder: Path) -> dict[str, Any]:
    """Return the manifest entry in a packed folder; empty if there is none. Raises ValueError if it is not a JSON object."""
    path = folder / PACKED_MEMBER_FILE
    return dict(read_json(path)) if lexists(path) else {}


def _recognised(tree: WeightsTree) -> list[MemberSpec | UnsupportedWeights]:
    with convert_folder_errors(tree.root):
        return [thing for family in registry.FAMILIES for thing in family.discover(tree)]
