"""The family `seals`: nnU-Net v1 trained-model folders, including those in DeepISLES' archive. Imports torch only when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.families.base import Family, InferenceSettings, Member, MemberDescription, NetworkSpec, UnsupportedWeights
from ensemble.families.folds import ALL_FOLDS_V1, nnunet_fold_folders
from ensemble.families.nnunet_v1.folder import PACKED_PLANS, PACKED_WEIGHTS, PLANS, WEIGHTS, read_nnunet_v1_folder
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.publish import write_json

if TYPE_CHECKING:
    from ensemble.weights.packed import PackedPrecision

#: The folder of DeepISLES' archive that holds the winner's networks, the name they vote under, the images they take, and their number.
_SEALS, _SEALS_NAME, _SEALS_CHANNELS, _SEALS_FOLDS = "SEALS", "seals", ("DWI", "ADC"), 5
#: nnU-Net v1 puts each configuration into a folder of this name; only its 3d_fullres networks can be used.
_OTHERS = ("2d", "3d_lowres", "3d_cascade_fullres")


class NnunetV1(Family):
    """The nnU-Net v1 family: finds, loads and packs trained-model folders (3d_fullres only), such as SEALS in DeepISLES."""

    kind = "seals"
    layout = "the SEALS folder of DeepISLES' weights"
    suffixes = frozenset({".model", ".pkl"})

    def discover(self, tree: WeightsTree) -> Iterator[MemberSpec | UnsupportedWeights]:
        """Find model folders, including those that lack some of their files."""
        of_weights = {fold.parent for fold in tree.folders_with(WEIGHTS)}
        of_plans = {folder for folder in tree.folders_with(PLANS) if self.folds(folder)}
        for folder in sorted(of_weights | of_plans):
            if not folder.is_relative_to(tree.root):
                continue  # the weights folder is that of a single fold
            if (configuration := _configuration(folder, tree.root)) in _OTHERS:
                yield UnsupportedWeights(tree.name_of(folder), folder, f"nnU-Net v1, {configuration}")
            elif _SEALS in folder.resolve().parts:
                yield MemberSpec(_SEALS_NAME, self.kind, folder, _SEALS_CHANNELS)
            else:
                yield MemberSpec(tree.name_of(folder), self.kind, folder)

    def folds(self, folder: Path) -> tuple[str, ...]:
        """Return the names of its folds."""
        return tuple(nnunet_fold_folders(folder, ALL_FOLDS_V1))

    def describe(self, folder: Path) -> MemberDescription:
        """Return what the plans and the folds' description files say."""
        plans = read_nnunet_v1_folder(folder).plans
        published = _SEALS_FOLDS if _SEALS in folder.resolve().parts else 0
        return MemberDescription(plans.modalities, plans.spacing_mm, published)

    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """See `member.py`."""
        from ensemble.families.nnunet_v1.member import NnunetV1Member

        return NnunetV1Member.load(spec, settings)

    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        """Return one network per fold."""
        from ensemble.families.nnunet_v1.member import network_specs

        return network_specs(read_nnunet_v1_folder(folder))

    def pack(self, source: Path, target: Path, precision: PackedPrecision) -> None:
        """Write each fold's weights as safetensors, and the plans as JSON."""
        from ensemble.families.nnunet_v1.checkpoints import pack_nnunet_v1_fold

        folder = read_nnunet_v1_folder(source)
        for path in folder.weights.values():
            fold = target / path.parent.name
            fold.mkdir()
            pack_nnunet_v1_fold(path, fold / PACKED_WEIGHTS, precision)
        write_json(folder.plans.as_json(), target / PACKED_PLANS)


def _configuration(folder: Path, weights: Path) -> str:
    """Return the configuration in a path .../nnUNet/<configuration>/<task>/<trainer__plans>; empty for other paths."""
    parts = folder.relative_to(weights.parent).parts
    return parts[-3] if len(parts) >= 3 else ""
