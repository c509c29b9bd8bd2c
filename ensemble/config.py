"""The options of a run after defaults are filled in: validated once, and written with every report."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ensemble.errors import UsageError

Device = Literal["auto", "cuda", "cpu"]
Tta = Literal["mirror", "none", "gated"]
FusionMethod = Literal["majority", "mean", "staple"]
SkullStrip = Literal["auto", "always", "never"]
Registration = Literal["auto", "never"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
SessionKind = Literal["auto", "torch", "onnx", "tensorrt"]

#: The shipped weights: inside the package where it was installed from a wheel (see setup.py), beside it in a clone or an image.
_PACKAGE = Path(__file__).resolve().parent
SHIPPED_WEIGHTS = (_PACKAGE if (_PACKAGE / "model_weights").is_dir() else _PACKAGE.parent) / "model_weights"
#: Where grand-challenge mounts an uploaded model; mounted, and empty, when none was uploaded.
PLATFORM_WEIGHTS = Path("/opt/ml/model")
#: Files there that are no weights: the folder of the starter kit contains a README and a sample text.
_NO_WEIGHTS = re.compile(
    r"^(readme|license|licence|notice|changelog|copying)(\..*)?$|\.(txt|md|rst|html?|pdf|png|jpe?g|svg|csv|ya?ml)$",
    re.IGNORECASE,
)
#: Options that do not affect the result: the weights' folder, whether code is allowed, and the device.
IMMATERIAL = frozenset({"weights", "device", "allow_torchscript"})
#: Prefix of the folders that hold outputs until they are published.
STAGING = ".staging-"


@dataclass(frozen=True)
class RunConfig:
    """How a case is segmented."""

    weights: Path | None = None
    """Folder with the members; None means `/opt/ml/model` if it contains weights, else the shipped ones."""
    members: tuple[str, ...] | None = None
    """Names of the members to use; None means all in the folder."""
    device: Device = "auto"
    """Device of the networks; auto uses a GPU if there is one."""
    tta: Tta = "mirror"
    """Test-time augmentation: each member's flips, none, or flips only where the first pass is uncertain."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto is what passed the parity gate on the device (see `inference/precision.py`)."""
    session: SessionKind = "auto"
    """What runs the networks: OpenVINO on the CPU and PyTorch on a GPU, PyTorch, ONNX Runtime, or ONNX Runtime with TensorRT; the latter
    two take members packed for it."""
    fusion: FusionMethod = "majority"
    """How the members' probabilities become one mask."""
    min_disputed_ml: float | None = None
    """Lesions below this, in ml, stay in the mask only if the voters' mean probability is high in some voxel; 0 keeps all. None means the
    value of the weights folder (see docs/adr/0015)."""
    member_weights: Mapping[str, float] | None = None
    """Weights of the members' votes by name, by default 1; None means those of the weights folder."""
    min_lesion_ml: float | None = None
    """Lesions below this, in ml, are removed from the mask; None means the value of the weights folder, 0 keeps all."""
    min_members: int | None = None
    """Smallest number of members that must vote; None means all for which the inputs suffice."""
    skull_strip: SkullStrip = "auto"
    """Whether the skull is stripped; auto strips it if there is one."""
    registration: Registration = "auto"
    """Whether FLAIR is registered to DWI; auto does so where that aligns it better than its header, never goes by the header."""
    brain_ml: tuple[float, float] = (300.0, 2500.0)
    """Accepted brain volume (ml); others are refused, because their voxel size may be wrong."""
    trust: bool = False
    """Whether the trust in the mask is judged."""

    allow_torchscript: bool = False
    """Whether TorchScript members, which contain code, may be loaded even if no manifest lists the digests of their files."""

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("--device", self.device, get_args(Device)),
            ("--tta", self.tta, get_args(Tta)),
            ("--precision", self.precision, get_args(Precision)),
            ("--session", self.session, get_args(SessionKind)),
            ("--fusion", self.fusion, get_args(FusionMethod)),
            ("--skull-strip", self.skull_strip, get_args(SkullStrip)),
            ("--registration", self.registration, get_args(Registration)),
        ):
            if value not in allowed:
                raise UsageError(f"{value!r} is not a valid value of {option}", do=f"use one of: {', '.join(allowed)}")
        for option, ml in (("--min-disputed-ml", self.min_disputed_ml), ("--min-lesion-ml", self.min_lesion_ml)):
            if ml is not None and not 0 <= ml < float("inf"):
                raise UsageError(f"{option} must be a volume in ml, 0 or more", found=str(ml))
        if odd := [f"{name}={w:g}" for name, w in (self.member_weights or {}).items() if not 0 < w < float("inf")]:
            raise UsageError(
                "--member-weights must be numbers greater than 0",
                found=", ".join(odd),
                do="use --members to exclude a member",
            )
        if not 0 <= self.brain_ml[0] < self.brain_ml[1] < float("inf"):
            raise UsageError(
                "--brain-ml must be two volumes in ml, 0 or more, smaller first",
                found=",".join(f"{ml:g}" for ml in self.brain_ml),
            )
        if self.min_members is not None and self.min_members < 1:
            raise UsageError("--min-members must be at least 1", found=str(self.min_members))
        if self.members is not None and not self.members:
            raise UsageError(
                "--members names no member", do="remove the option to use all members, or name some: --members a,b"
            )
        if self.members is not None and len(set(self.members)) != len(self.members):
            raise UsageError(
                "--members names a member twice", found=", ".join(self.members), do="name each member once"
            )

    @property
    def weights_folder(self) -> Path:
        """The folder in which members are looked for."""
        if self.weights is not None:
            return self.weights
        return PLATFORM_WEIGHTS if holds_weights(PLATFORM_WEIGHTS) else SHIPPED_WEIGHTS

    @property
    def platform_note(self) -> str:
        """Why the shipped members are used although `/opt/ml/model` is not empty; empty if there is nothing to say."""
        if self.weights is not None or holds_weights(PLATFORM_WEIGHTS) or not PLATFORM_WEIGHTS.is_dir():
            return ""
        names = sorted(path.name for path in PLATFORM_WEIGHTS.iterdir() if not path.name.startswith("."))
        if not names:
            return ""
        return f"{PLATFORM_WEIGHTS} holds no weights ({', '.join(names[:5])}): the shipped members take part"

    def as_json(self) -> dict[str, Any]:
        """Return the options as `report.json` holds them."""
        return asdict(self) | {
            "weights": str(self.weights_folder),
            "speck_ml": self.min_disputed_ml,
        }  # its name until 0.2


@dataclass(frozen=True)
class ExtraOutputs:
    """Which outputs are written besides the mask."""

    report: bool = False
    """`report.json`, `report.html` and `overlay.png`."""
    save_probabilities: bool = False
    """Mean lesion probability of the voters, and each voter's own."""
    save_member_masks: bool = False
    """Each voter's own mask, and the number of votes in each voxel."""
    findings: bool = False
    """The location of the lesions, in `report.json` and on the page."""
    atlas: Path | None = None
    """Folder of the user's label maps, for the findings."""
    save_mni: bool = False
    """Mask and images in the template's space; not written if the brain can't be registered."""
    dicom: bool = False
    """DICOM objects in the study of the DWI: segmentation, measurement report, secondary capture of the picture."""
    dicom_probability: bool = False
    """Beside them the mean lesion probability, as a fractional segmentation."""

    @property
    def show_images(self) -> bool:
        """Whether any of them shows or describes the images."""
        return self.report or self.save_mni or self.dicom


def holds_weights(folder: Path) -> bool:
    """Return whether a folder may hold weights: any file at any depth except notes, pictures and hidden files.

    Also True if the folder can't be read, so that the later error says why.
    """
    if not folder.is_dir():
        return False
    try:
        return not all(path.name.startswith(".") or _NO_WEIGHTS.search(path.name) for path in files_below(folder))
    except OSError:
        return True


def files_below(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield every file below a folder. Links to folders are followed, except those that form a loop.

    Raises OSError if one can't be read.

    Folders that are hidden, or the file system's own, are passed over; with `hidden`, only where they can't be read.
    """

    def stop(error: OSError) -> None:
        if not any(_is_hidden(part) for part in Path(error.filename or folder).relative_to(folder).parts):
            raise error

    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted(
            name for name in folders if (hidden or not _is_hidden(name)) and not _leads_back(Path(place), name, folder)
        )
        yield from (Path(place) / name for name in sorted(names))


def _leads_back(place: Path, name: str, root: Path) -> bool:
    """Return whether an entry is a link to one of the folders above it up to the root, or to a folder that holds one of them."""
    if not (place / name).is_symlink():
        return False
    way = [place, *(parent for parent in place.parents if parent.is_relative_to(root))]
    return any(folder.resolve().is_relative_to((place / name).resolve()) for folder in way)


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder == "lost+found"
