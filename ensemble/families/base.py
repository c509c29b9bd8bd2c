"""The interfaces of members and of families of members. Imports no torch.

A member is one or several networks that vote as one: it turns a prepared case into a lesion probability on the DWI grid. A family is the
code for weights of one kind, such as nnU-Net v2 folders. It finds them in a folder, describes, loads and packs them, builds their
networks, and knows how much memory a window takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ensemble.config import Precision, RunConfig, SessionKind, Tta
from ensemble.errors import UsageError
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.prepare.case import PreparedCase
from ensemble.types import FloatArray, Modality, ProgressCallback
from ensemble.volume import Volume

if TYPE_CHECKING:
    from torch import nn

    from ensemble.inference.features import PooledFeatures
    from ensemble.weights import packed


@dataclass(frozen=True)
class InferenceSettings:
    """How networks are run, the same for all members."""

    device: str = "cpu"
    """A torch device: "cpu", "cuda"."""
    tta: Tta = "mirror"
    """Test-time augmentation: which of the flips that a member was trained with are used."""
    precision: Precision = "auto"
    """Arithmetic of the networks."""
    session: SessionKind = "auto"
    """What runs the networks."""
    features: bool = False
    """Whether members return encoder features with their prediction."""
    allow_torchscript: bool = False
    """Whether TorchScript, which is code, may run although no manifest names its file by digest."""

    @property
    def packed_form(self) -> bool:
        """Whether networks run from the ONNX files that they were packed with."""
        return self.session in ("onnx", "tensorrt")

    @classmethod
    def of(cls, config: RunConfig, device: str) -> InferenceSettings:
        """Return the settings of a run on a torch device."""
        return cls(device, config.tta, config.precision, config.session, config.trust, config.allow_torchscript)


@dataclass(frozen=True)
class MemberPrediction:
    """One member's prediction of one case."""

    member: str
    probability: Volume
    """Lesion probability, float32 in 0..1, on the DWI grid."""
    networks: int
    """How many networks (folds) were averaged."""
    arithmetic: str = ""
    """Their precision and runtime, for the report: for example "fp32, OpenVINO"."""
    remark: str = ""
    """Which input it lacked, for the report: for example "without FLAIR"."""
    features: PooledFeatures | None = None
    """Encoder features of its first network; None if not requested or not available."""

    @property
    def mask(self) -> Volume:
        """The member's lesion mask (bool): its probability is above 0.5."""
        return self.probability.like(self.probability.array > 0.5)


@dataclass(frozen=True)
class PartialProgress:
    """Reports the progress of one of several equal parts as progress of the whole."""

    progress: ProgressCallback
    part: int
    parts: int

    def __call__(self, done: int, total: int) -> None:
        self.progress(self.part * total + done, self.parts * total)


class Member(Protocol):
    """A loaded member. Its networks stay in memory between calls. One call at a time."""

    @property
    def name(self) -> str:
        """The name under which it votes."""

    @property
    def requires(self) -> frozenset[Modality]:
        """The images that it can't do without."""

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Return the lesion probability on the DWI grid. Raises on any failure: a member never substitutes a result."""


@runtime_checkable
class EncodingMember(Member, Protocol):
    """A member that exposes the features of each encoder stage, pooled over regions of an image."""

    def encode(self, case: PreparedCase, regions: FloatArray) -> tuple[FloatArray, ...]:
        """Return its first network's mean features (R, D) in regions, an array for each stage of the encoder, first to last.

        `regions` (R, z, y, x) are shares of voxels on the DWI grid. It must have been opened with `session` "torch" and `features`.
        """


@dataclass(frozen=True)
class UnsupportedWeights:
    """Weights that a family recognised but can't run yet, for the list of members."""

    name: str
    folder: Path
    what: str


@dataclass(frozen=True)
class MemberDescription:
    """What a member's small files (plans, JSON) say about its networks, read without loading any."""

    channels: tuple[str, ...]
    """What each input channel is called."""
    spacing_mm: tuple[float, ...]
    """Voxel spacing that they work at; in-plane for 2-D networks."""
    published: int = 0
    """Number of published folds, 0 if unknown. Missing ones are reported."""
    remarks: tuple[str, ...] = ()
    """Which published files are missing, if the folds alone do not show it."""


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a member (usually one fold), before it is built."""

    weights: Path
    """Its weights file. An ONNX form, if any, is beside it."""
    channels: int
    spacing_mm: tuple[float, ...]
    """Voxel spacing that it works at; two axes for 2-D networks."""
    patch: tuple[int, ...]
    """Size of its sliding window (patch), one number an axis."""
    smallest_window: tuple[int, ...]
    """A small window that it can take, one number an axis."""
    window_bytes: int
    """Memory that the activations of one window take."""
    memory_of: str
    """Why the activations are so large, for messages."""
    build: Callable[[], nn.Module]
    """Builds the network and loads its weights. Raises WeightsBroken."""
    tap: str = ""
    """Dotted name of the layer whose maps are the encoder's features; empty if unknown."""
    convert: bool = True
    """Whether OpenVINO runs it on the CPU. False if conversion takes longer than it saves in a case (docs/adr/0020)."""


class ReferenceProgram(Protocol):
    """The program that these weights come from (for example nnU-Net). It predicts with them itself, for comparison."""

    @property
    def title(self) -> str:
        """Its name and version."""

    def probability(self, member: Member, case: PreparedCase, settings: InferenceSettings) -> FloatArray:
        """Return the lesion probability (z, y, x) on the DWI grid, from the member's own input. Raises what the program raises."""


class MemberFinder(Protocol):
    """Finds the members of one kind in a weights folder, by their file layout."""

    @property
    @abstractmethod
    def suffixes(self) -> frozenset[str]:
        """Suffixes of its files that affect predictions, besides `registry.PACKED_SUFFIXES`."""

    @abstractmethod
    def discover(self, tree: WeightsTree) -> Iterable[MemberSpec | UnsupportedWeights]:
        """Return the members in a weights folder, and recognised weights that are not supported yet. Raises WeightsBroken."""


class Family(MemberFinder, Protocol):
    """The code for members of one kind. Adding it to `registry.FAMILIES` makes the kind available."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The value of "kind" in a manifest."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """The folder layouts that are recognised, for messages."""

    @abstractmethod
    def folds(self, folder: Path) -> tuple[str, ...]:
        """Return the names of a member's folds: "0", "1", ... or "all"."""

    @abstractmethod
    def describe(self, folder: Path) -> MemberDescription:
        """Describe a member from the small files of its folder, without loading networks. Raises WeightsBroken."""

    @abstractmethod
    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """Load a member's networks onto the device. Raises WeightsBroken if anything is missing, damaged or not supported."""

    @abstractmethod
    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        """Return the networks in a member's folder, packed or not. Raises WeightsBroken."""

    def pack(self, source: Path, target: Path, precision: packed.PackedPrecision) -> None:
        """Write a member's folder without pickles and optimizer states. Raises WeightsBroken; UsageError if the kind can't be packed."""
        raise UsageError(f"members of kind {self.kind} can't be packed", where=source, do="use the folder as it is")

    def reference(self) -> ReferenceProgram | None:
        """Return the program that these weights come from, for comparison; None if there is none.

        Raises UsageError if it is not installed.
        """
        return None
