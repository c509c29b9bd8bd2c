"""The family `swan`: the networks of team SWAN in DeepISLES' archive. Imports torch only when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.families.base import Family, InferenceSettings, Member, MemberDescription, NetworkSpec, UnsupportedWeights
from ensemble.families.spec import MemberSpec
from ensemble.families.swan.folder import CHECKPOINTS, NETWORKS, PACKED, SUFFIX, read_swan_folder, swan_fold_folders
from ensemble.families.tree import WeightsTree

if TYPE_CHECKING:
    from ensemble.weights.packed import PackedPrecision

#: The folder of DeepISLES' archive that holds them, and the name they vote under.
_TEAM, _NAME = "FACTORIZER", "swan"
_CHANNELS = ("DWI", "ADC", "FLAIR")


class Swan(Family):
    """The SWAN family: finds, loads and packs the networks of team SWAN in DeepISLES (ResUNet and Swin Factorizer)."""

    kind = "swan"
    layout = "the FACTORIZER folder of DeepISLES' weights"
    suffixes = frozenset({SUFFIX})

    def discover(self, tree: WeightsTree) -> Iterator[MemberSpec | UnsupportedWeights]:
        """Find folders with such folds, including incomplete ones; and other contents of the team's folder."""
        found, others = set(), []
        for path in (path for path in tree.files if path.suffix == SUFFIX):
            if (folder := _member_of(path)) is not None and folder.is_relative_to(tree.root):
                found.add(folder)
            elif _TEAM in path.resolve().parts:
                others.append(path)
        for folder in sorted(found):
            name = _NAME if len(found) == 1 or _TEAM in folder.resolve().parts else tree.name_of(folder)
            yield MemberSpec(name, self.kind, folder, _CHANNELS)
        if others:
            yield UnsupportedWeights(
                _TEAM, others[0].parent, f"{len(others)} Lightning checkpoints in other folders than SWAN's"
            )

    def folds(self, folder: Path) -> tuple[str, ...]:
        """Return the names of its folds."""
        return tuple(swan_fold_folders(folder))

    def describe(self, folder: Path) -> MemberDescription:
        """Return the same description for all; members differ only in which networks are there."""
        missing = read_swan_folder(folder).missing
        return MemberDescription(_CHANNELS, (2.0, 2.0, 2.0), remarks=(missing,) if missing else ())

    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """See `member.py`."""
        from ensemble.families.swan.member import SwanMember

        return SwanMember.load(spec, settings)

    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        """Return one network per fold and architecture."""
        from ensemble.families.swan.checkpoints import network_specs

        return network_specs(read_swan_folder(folder))

    def pack(self, source: Path, target: Path, precision: PackedPrecision) -> None:
        """Write each network's weights as safetensors."""
        from ensemble.families.swan.checkpoints import pack_swan_network

        for (fold, kind), path in read_swan_folder(source).weights.items():
            place = target / f"fold{fold}" / kind
            place.mkdir(parents=True)
            pack_swan_network(path, place / PACKED, precision)


def _member_of(path: Path) -> Path | None:
    """Return the member folder that a checkpoint's path belongs to; None for other paths."""
    *_, fold, network, version, checkpoints, _ = ("", "", "", "", *path.parts)
    fits = network in NETWORKS and (version, checkpoints) == CHECKPOINTS and fold.startswith("fold")
    return path.parents[4] if fits else None
