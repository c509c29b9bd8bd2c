"""The family `nvauto`: the networks of NVAUTO in DeepISLES' archive, as TorchScript or packed. Imports torch only when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.families.base import Family, InferenceSettings, Member, MemberDescription, NetworkSpec, UnsupportedWeights
from ensemble.families.nvauto.folder import SCRIPT_SUFFIX, is_torchscript_name, network_files, require_network_files
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree

if TYPE_CHECKING:
    from ensemble.weights.packed import PackedPrecision

#: The folder of DeepISLES' archive that holds the networks, the name they vote under, the images they take, and how many were published.
_TEAM, _NAME, _CHANNELS, _PUBLISHED = "NVAUTO", "nvauto", ("ADC", "DWI"), 15


class Nvauto(Family):
    """The NVAUTO family: finds, loads and packs the networks of NVAUTO in DeepISLES (MONAI's SegResNet), as TorchScript or packed."""

    kind = "nvauto"
    layout = "the NVAUTO folder of DeepISLES' weights"
    suffixes = frozenset({SCRIPT_SUFFIX})

    def discover(self, tree: WeightsTree) -> Iterator[MemberSpec | UnsupportedWeights]:
        """Find members by file names only, because TorchScript is code."""
        scripts = [path for path in tree.files if path.suffix == SCRIPT_SUFFIX and _TEAM in path.resolve().parts]
        for folder in sorted({path.parent for path in scripts}):
            names = [path for path in scripts if path.parent == folder]
            if any(map(is_torchscript_name, names)):
                yield MemberSpec(_NAME, self.kind, folder, _CHANNELS)
            if others := [path.name for path in names if not is_torchscript_name(path)]:
                yield UnsupportedWeights(
                    _TEAM, folder, f"TorchScript files not called model0{SCRIPT_SUFFIX}: {', '.join(others)}"
                )

    def folds(self, folder: Path) -> tuple[str, ...]:
        """Return the networks' numbers."""
        return tuple(map(str, network_files(folder)))

    def describe(self, folder: Path) -> MemberDescription:
        """Return the same description for all: the network files are not opened."""
        require_network_files(folder)
        return MemberDescription(_CHANNELS, (1.0, 1.0, 1.0), _PUBLISHED if _TEAM in folder.resolve().parts else 0)

    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """See `member.py`."""
        from ensemble.families.nvauto.member import NvautoMember

        return NvautoMember.load(spec, settings)

    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        """Return one network per file."""
        from ensemble.families.nvauto.member import network_specs

        return network_specs(folder)

    def pack(self, source: Path, target: Path, precision: PackedPrecision) -> None:
        """Write each network's weights as safetensors and its architecture as JSON; no TorchScript is run."""
        from ensemble.families.nvauto.rebuild import pack_nvauto_network

        for number, path in require_network_files(source).items():
            (place := target / f"model{number}").mkdir()
            pack_nvauto_network(path, place, precision)
