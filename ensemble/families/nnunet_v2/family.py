"""The family `nnunet`: nnU-Net v2 trained-model folders at any depth of a weights folder. Imports torch only when needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.errors import WeightsBroken
from ensemble.families.base import Family, InferenceSettings, Member, MemberDescription, NetworkSpec, ReferenceProgram
from ensemble.families.folds import ALL_FOLDS_V2, nnunet_fold_folders
from ensemble.families.nnunet_v2.plans import read_plans
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.files import error_in_words, read_json

if TYPE_CHECKING:
    from ensemble.weights.packed import PackedPrecision

#: Key of dataset.json with a member's requirements on its images, as in a manifest entry.
MEMBER_METADATA_KEY = "isles_ensemble"


class NnunetV2(Family):
    """The nnU-Net v2 family: finds, loads and packs trained-model folders at any depth of a weights folder."""

    kind = "nnunet"
    layout = "nnU-Net v2 model folders (dataset.json, plans.json, fold_*/checkpoint_final.pth)"
    suffixes = frozenset({".pth"})

    def discover(self, tree: WeightsTree) -> Iterator[MemberSpec]:
        """Find folders with plans.json and dataset.json. Those trained on tissue-normalised intensities are marked so in dataset.json."""
        for folder in sorted(tree.folders_with("plans.json") & tree.folders_with("dataset.json")):
            yield _spec(folder, tree)

    def folds(self, folder: Path) -> tuple[str, ...]:
        """Return the names of its folds."""
        return tuple(nnunet_fold_folders(folder, ALL_FOLDS_V2))

    def describe(self, folder: Path) -> MemberDescription:
        """Return what plans.json and dataset.json say."""
        plans = read_plans(folder, None)
        return MemberDescription(plans.channel_names, plans.spacing_mm)

    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """See `member.py`."""
        from ensemble.families.nnunet_v2.member import NnunetV2Member

        return NnunetV2Member.load(spec, settings)

    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        """Return one network per fold."""
        from ensemble.families.nnunet_v2.checkpoints import read_nnunet_v2_folder
        from ensemble.families.nnunet_v2.member import network_specs

        return network_specs(read_nnunet_v2_folder(folder))

    def pack(self, source: Path, target: Path, precision: PackedPrecision) -> None:
        """Write each fold's checkpoint as safetensors, and the two JSON files."""
        from ensemble.families.nnunet_v2.checkpoints import PACKED_CHECKPOINT, checkpoint_paths, pack_fold

        for path in checkpoint_paths(source):
            fold = target / path.parent.name
            fold.mkdir()
            pack_fold(path, fold / PACKED_CHECKPOINT, precision)
        for name in ("dataset.json", "plans.json"):
            shutil.copyfile(source / name, target / name)

    def reference(self) -> ReferenceProgram:
        """See `reference.py`."""
        from ensemble.families.nnunet_v2.reference import NnunetV2Reference

        return NnunetV2Reference.installed()


def _spec(folder: Path, tree: WeightsTree) -> MemberSpec:
    dataset = folder / "dataset.json"
    try:
        own = read_json(dataset).get(MEMBER_METADATA_KEY, {})
        return MemberSpec.from_json({**own, "name": tree.name_of(folder), "kind": NnunetV2.kind}, folder)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "dataset.json can't be read",
            where=dataset,
            found=error_in_words(error),
            do="restore the dataset.json of these weights",
        ) from error
