"""The plans of an nnU-Net v2 model: `plans.json` and `dataset.json`, as frozen dataclasses.

Formats: nnunetv2 2.0 to 2.8 (`plans_handler.py`, `label_handling.py`), old plans without an `architecture` block included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, TypeVar

from ensemble.errors import WeightsBroken
from ensemble.families.unet import window_bytes
from ensemble.files import error_in_words, read_json
from ensemble.resample import NnunetResampling

#: Among several foreground labels, the lesion is the one with one of these words in its name.
LESION_WORDS = ("lesion", "stroke", "infarct", "ischemi", "ischaemi")

_READERS = {
    "SimpleITKIO": False,
    "NibabelIO": False,
    "SimpleITKIOWithReorient": True,
    "NibabelIOWithReorient": True,
}

#: nnU-Net's normalisation schemes, and the training statistics that each needs.
NORMALISATION_STATISTICS: Mapping[str, tuple[str, ...]] = {
    "ZScoreNormalization": (),
    "CTNormalization": ("mean", "std", "percentile_00_5", "percentile_99_5"),
    "NoNormalization": (),
    "RescaleTo01Normalization": (),
    "RGBTo01Normalization": (),
}

#: More than any argument of a network is, and more blocks than any stage, or stages than any network, has.
_MAX_NUMBER, _MAX_BLOCKS = 8192, 64

T = TypeVar("T")


@dataclass(frozen=True)
class Architecture:
    """The network architecture in the plans."""

    class_name: str
    """Dotted path of the class, as written by the planner."""
    kwargs: Mapping[str, Any]
    """Its arguments; those in `imported` are dotted names."""
    imported: tuple[str, ...]
    """Names of arguments whose value is the name of a class."""


@dataclass(frozen=True)
class Normalisation:
    """How one input channel is normalised."""

    scheme: str
    """nnU-Net's class name, for example ZScoreNormalization."""
    use_mask: bool
    """Compute the statistics, and apply them, only inside the non-zero region."""
    intensities: Mapping[str, float]
    """Those statistics of the training data's foreground that the scheme needs."""


@dataclass(frozen=True)
class NnunetV2Plans:
    """One configuration of a trained model."""

    configuration: str
    """Its name, for example 3d_fullres."""
    patch: tuple[int, ...]
    """Window of the network, two or three axes."""
    spacing_mm: tuple[float, ...]
    """Voxel spacing that the network works at, in transposed axis order; two axes for 2-D networks."""
    transpose_forward: tuple[int, int, int]
    """The (z, y, x) axis that becomes the network's first, second, third one."""
    reorient: bool
    """Whether images were read in RAS+ orientation, whatever their files' axes (readers named ...WithReorient)."""
    normalisation: tuple[Normalisation, ...]
    """For each input channel."""
    resample_image: NnunetResampling
    resample_logits: NnunetResampling
    architecture: Architecture
    channel_names: tuple[str, ...]
    """For each input channel, what dataset.json calls it."""
    classes: int
    """Output channels of the network; the first is background."""
    lesion_classes: tuple[int, ...]
    """Output channels whose probabilities are summed to the lesion probability."""

    @property
    def dims(self) -> int:
        """Spatial dimensions of the network."""
        return len(self.patch)

    @property
    def smallest_window(self) -> tuple[int, ...]:
        """A small window that all strides divide, with more than one voxel left at the bottleneck."""
        return tuple(2 * factor for factor in _strides(self.architecture, self.dims))

    @property
    def bottleneck(self) -> str:
        """Name of the encoder's last stage, in the networks that `network.build_nnunet_v2_network` builds."""
        return f"encoder.stages.{len(self.architecture.kwargs['strides']) - 1}"

    @property
    def features(self) -> int:
        """Feature maps of the network's first stage. Raises KeyError, ValueError, TypeError or IndexError if the plans do not say."""
        features = self.architecture.kwargs["features_per_stage"]
        return int(features[0] if isinstance(features, list) else features)

    @property
    def window_bytes(self) -> int:
        """Memory that the activations of one window take. Raises as `features` does."""
        return window_bytes(self.patch, self.features)


def read_plans(folder: Path, configuration: str | None) -> NnunetV2Plans:
    """Read `dataset.json` and `plans.json` of a model folder.

    `configuration` is the one that the checkpoint names. If it is None, the folder's name (trainer__plans__configuration) decides;
    if that names none either, the plans must have exactly one. Raises WeightsBroken, naming
    file and key, for whatever is missing, contradictory or not supported.
    """
    dataset = _JsonFile(folder / "dataset.json")
    plans = _JsonFile(folder / "plans.json")
    name = configuration or _configuration_name(folder, plans)
    chosen = _with_inherited(plans, name)
    if chosen.get("previous_stage"):
        raise plans.broken(
            f"configuration {name} is the second stage of a cascade", "use a model that is not a cascade"
        )
    if (preprocessor := chosen.get("preprocessor_name", "DefaultPreprocessor")) != "DefaultPreprocessor":
        raise plans.broken(f"preprocessor {preprocessor} is not supported")
    if (manager := plans.content.get("label_manager", "LabelManager")) != "LabelManager":
        raise plans.broken(f"label manager {manager} is not supported")
    classes, lesion_classes = _labels(dataset)
    channels = _channel_names(dataset)
    patch = plans.read("patch_size", lambda: tuple(int(n) for n in chosen["patch_size"]))
    if len(patch) not in (2, 3):
        raise plans.broken(f"patch_size has {len(patch)} axes")
    architecture = plans.read("architecture", lambda: _architecture(chosen))
    plans.read("architecture", lambda: _check_numbers(architecture.kwargs, ""))
    plans.read("patch_size", lambda: _check_patch(patch, architecture))
    return NnunetV2Plans(
        configuration=name,
        patch=patch,
        spacing_mm=plans.read("spacing", lambda: _spacing(chosen["spacing"], len(patch))),
        transpose_forward=plans.read("transpose_forward", lambda: _permutation(plans.content["transpose_forward"])),
        reorient=plans.read("image_reader_writer", lambda: _READERS[plans.content["image_reader_writer"]]),
        normalisation=plans.read("normalization_schemes", lambda: _normalisation(plans.content, chosen, len(channels))),
        resample_image=plans.read("resampling_fn_data", lambda: _resampling(chosen, "resampling_fn_data")),
        resample_logits=plans.read(
            "resampling_fn_probabilities", lambda: _resampling(chosen, "resampling_fn_probabilities")
        ),
        architecture=architecture,
        channel_names=channels,
        classes=classes,
        lesion_classes=lesion_classes,
    )


class _JsonFile:
    """A JSON object that names its path in every error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsBroken(
                f"{path.name} can't be read",
                where=path,
                found=error_in_words(error),
                do="give a complete nnU-Net v2 model folder (dataset.json, plans.json, fold_*/checkpoint_final.pth)",
            ) from error
        if not isinstance(content, dict):
            raise self.broken(f"a JSON {type(content).__name__} instead of an object")
        self.content: dict[str, Any] = content

    def read(self, key: str, parse: Callable[[], T]) -> T:
        """Return `parse` applied to a key; raise WeightsBroken where that fails."""
        try:
            return parse()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            missing = isinstance(error, KeyError)
            raise self.broken(f"{key}: {'missing or unknown: ' if missing else ''}{error}") from error

    def broken(self, found: str, do: str = "use the file that nnU-Net v2 wrote with these weights") -> WeightsBroken:
        """Return the error to raise about this file."""
        return WeightsBroken(f"{self.path.name} is not supported", where=self.path, found=found, do=do)


def _configuration_name(folder: Path, plans: _JsonFile) -> str:
    names = plans.read("configurations", lambda: list(plans.content["configurations"]))
    from_folder = folder.name.split("__")[-1]
    if from_folder in names:
        return from_folder
    if len(names) != 1:
        raise plans.broken(
            f"several configurations ({', '.join(names)}), and neither the checkpoint nor the folder's name says which"
        )
    return str(names[0])


def _with_inherited(plans: _JsonFile, name: str) -> dict[str, Any]:
    """Return a configuration merged with those it inherits from; its own keys win."""
    configurations = plans.read("configurations", lambda: dict(plans.content["configurations"]))
    lineage: list[str] = []
    parent: str | None = name
    while parent is not None:
        if parent not in configurations:
            raise plans.broken(f"no configuration {parent} among {', '.join(configurations)}")
        if parent in lineage:
            raise plans.broken(f"configurations inherit in a circle: {' -> '.join([*lineage, parent])}")
        lineage.append(parent)
        parent = configurations[parent].get("inherits_from")
    merged: dict[str, Any] = {}
    for ancestor in reversed(lineage):
        merged |= configurations[ancestor]
    return merged


def _channel_names(dataset: _JsonFile) -> tuple[str, ...]:
    """Return the names in the order of their indices. Early datasets have them under `modality`."""
    key = "modality" if "modality" in dataset.content else "channel_names"
    names: dict[str, Any] = dataset.read(key, lambda: dict(dataset.content[key]))
    if sorted(names, key=str) != sorted(str(index) for index in range(len(names))) or not names:
        raise dataset.broken(f"{key} has the keys {', '.join(names)}; expected 0, 1, ...")
    return tuple(str(names[str(index)]) for index in range(len(names)))


def _labels(dataset: _JsonFile) -> tuple[int, tuple[int, ...]]:
    """Return the number of output channels, and those that are lesion: the labels named as lesion, or all foreground if none is."""
    labels: dict[str, Any] = dataset.read("labels", lambda: dict(dataset.content["labels"]))
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        raise dataset.broken("region-based labels", "train with plain labels: background 0, lesion 1")
    values = dataset.read(
        "labels",
        lambda: {
            name: int(value[0] if isinstance(value, list) else value)
            for name, value in labels.items()
            if name != "ignore"
        },
    )
    if values.get("background") != 0 or len(values) < 2:
        raise dataset.broken(f"labels {labels}; expected background 0 and at least one more")
    channels = sorted(set(values.values()))
    foreground = {name: channels.index(value) for name, value in values.items() if value != 0}
    lesion = [index for name, index in foreground.items() if any(word in name.lower() for word in LESION_WORDS)]
    return len(channels), tuple(sorted(set(lesion or foreground.values())))


def _normalisation(plans: Mapping[str, Any], chosen: Mapping[str, Any], channels: int) -> tuple[Normalisation, ...]:
    schemes, masks = chosen["normalization_schemes"], chosen["use_mask_for_norm"]
    if len(schemes) != channels or len(masks) != channels:
        raise ValueError(f"{len(schemes)} schemes and {len(masks)} masks for {channels} channels")
    by_channel = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    channel_schemes = []
    for index, (scheme, mask) in enumerate(zip(schemes, masks, strict=True)):
        if scheme not in NORMALISATION_STATISTICS:
            raise ValueError(f"{scheme!r} is not one of {', '.join(NORMALISATION_STATISTICS)}")
        needed, known = NORMALISATION_STATISTICS[scheme], by_channel.get(str(index)) or {}
        if missing := [key for key in needed if key not in known]:
            raise ValueError(f"{scheme} of channel {index} needs the training data's {', '.join(missing)}")
        channel_schemes.append(Normalisation(scheme, bool(mask), {key: float(known[key]) for key in needed}))
    return tuple(channel_schemes)


def _resampling(chosen: Mapping[str, Any], key: str) -> NnunetResampling:
    return NnunetResampling.from_plans(str(chosen[key]), dict(chosen[f"{key}_kwargs"]))


def _check_numbers(value: Any, key: str) -> None:
    """Raise ValueError for numbers in a network's arguments that no planner writes; they would exhaust memory and time."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_numbers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(inner, key)
    elif isinstance(value, int | float):
        most = _MAX_BLOCKS if key.startswith(("n_conv_per_stage", "n_blocks_per_stage", "n_stages")) else _MAX_NUMBER
        if not 0 <= value <= most:
            raise ValueError(f"{key} {str(value)[:20]} is not within 0 to {most}")


def _check_patch(patch: Sequence[int], architecture: Architecture) -> None:
    """Raise ValueError for windows that the network's strides do not divide."""
    for axis, (length, factor) in enumerate(zip(patch, _strides(architecture, len(patch)), strict=True)):
        if factor < 1 or length < factor or length % factor:
            raise ValueError(
                f"{length} along axis {axis} is not a multiple of {factor}, the product of the network's strides"
            )


def _strides(architecture: Architecture, dims: int) -> list[int]:
    """Return the total downsampling factor of the network along each axis."""
    strides = [stride if isinstance(stride, list) else [stride] * dims for stride in architecture.kwargs["strides"]]
    return [prod(int(stride[axis]) for stride in strides) for axis in range(dims)]


def _spacing(millimetres: Sequence[Any], axes: int) -> tuple[float, ...]:
    spacing = tuple(float(mm) for mm in millimetres)
    if len(spacing) != axes or not all(0 < mm < inf for mm in spacing):
        raise ValueError(f"{spacing} for {axes} axes")
    return spacing


def _permutation(axes: Sequence[Any]) -> tuple[int, int, int]:
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"{axes} is not a permutation of 0, 1, 2")
    return int(axes[0]), int(axes[1]), int(axes[2])


def _architecture(chosen: Mapping[str, Any]) -> Architecture:
    if "architecture" in chosen:
        block = chosen["architecture"]
        return Architecture(
            str(block["network_class_name"]), dict(block["arch_kwargs"]), tuple(map(str, block["_kw_requires_import"]))
        )
    return _old_architecture(chosen)


def _old_architecture(chosen: Mapping[str, Any]) -> Architecture:
    """Return the architecture that plans of nnU-Net 2.0 to 2.2 describe by single numbers."""
    class_name = str(chosen["UNet_class_name"])
    blocks = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}[class_name]
    stages = len(chosen["n_conv_per_stage_encoder"])
    base, most = int(chosen["UNet_base_num_features"]), int(chosen["unet_max_num_features"])
    dims = len(chosen["patch_size"])
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": chosen["conv_kernel_sizes"],
        "strides": chosen["pool_op_kernel_sizes"],
        blocks: chosen["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": chosen["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(class_name, kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin"))
