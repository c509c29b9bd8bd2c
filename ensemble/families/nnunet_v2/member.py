"""Member kind `nnunet`: any nnU-Net v2 trained-model folder.

It predicts the same as nnunetv2's own nnUNetPredictor (tests compare both); nnunetv2 itself is not needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings, MemberPrediction, NetworkSpec
from ensemble.families.channels import InputChannel, parse_channel, shift_slices
from ensemble.families.nnunet_v2.checkpoints import NnunetV2Folder, read_nnunet_v2_folder
from ensemble.families.nnunet_v2.network import build_nnunet_v2_network
from ensemble.families.nnunet_v2.plans import NnunetV2Plans
from ensemble.families.nnunet_v2.processing import postprocess, preprocess
from ensemble.families.sessions import open_sessions
from ensemble.families.spec import ENTRY_FILES, MemberSpec
from ensemble.families.unet import explain_window_memory
from ensemble.geometry import Grid, Reorientation, Triple
from ensemble.inference.capacity import buffer_device, window_batch_size
from ensemble.inference.engine import MirrorMode, SlidingWindowConfig, sliding_window_inference
from ensemble.inference.features import FeaturePool
from ensemble.inference.regions import region_mean_features
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_torch import TorchSession
from ensemble.prepare.case import PreparedCase
from ensemble.types import FloatArray, Modality, ProgressCallback
from ensemble.weights.checkpoints import load_weights


@dataclass(frozen=True)
class NnunetV2Member:
    """A trained model with the networks of all folds in memory."""

    spec: MemberSpec
    plans: NnunetV2Plans
    channels: tuple[InputChannel, ...]
    """What each input channel shows."""
    mirror_axes: tuple[int, ...]
    """Network axes (0 to 2) that were mirrored in training."""
    sessions: tuple[LoadedSession, ...]
    """One for each fold."""

    @classmethod
    def load(cls, spec: MemberSpec, settings: InferenceSettings) -> NnunetV2Member:
        """Read a model folder and load its networks onto the device.

        Raises WeightsBroken, naming file and finding, if anything is missing, damaged, contradictory or not supported.
        """
        model = read_nnunet_v2_folder(spec.folder)
        return cls(
            spec=spec,
            plans=model.plans,
            channels=_channels(spec, model.plans),
            mirror_axes=_mirror_axes(model),
            sessions=open_sessions(spec, network_specs(model), settings),
        )

    @property
    def name(self) -> str:
        """The name under which it votes."""
        return self.spec.name

    @property
    def requires(self) -> frozenset[Modality]:
        """The images that it can't do without."""
        return frozenset(channel.modality for channel in self.channels if not channel.optional)

    @property
    def _modalities(self) -> frozenset[Modality]:
        return frozenset(channel.modality for channel in self.channels)

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Return the lesion probability on the DWI grid; folds are averaged as logits.

        Networks stay on the device they were loaded to. Raises NonFiniteLogits, ValueError for
        intensities that the plans' normalisation can't take, or what torch raises.
        """
        images, spacing, orientation = self.network_input(case)
        array, placement = preprocess(images, spacing, self.plans)
        buffers = buffer_device(array[0].nbytes * (len(array) + self.plans.classes + 1), self.sessions[0].device)
        image = torch.from_numpy(array).to(buffers)
        pool = FeaturePool() if self.sessions[0].tap else None
        logits = sliding_window_inference(image, self.sessions, self._windows(settings), progress, pool)
        probability = orientation.undo(postprocess(logits.cpu().numpy(), placement, self.plans))
        volume = case.images[Modality.DWI].like(np.ascontiguousarray(probability))
        lacking = ", ".join(sorted(modality.label for modality in self._modalities - case.modalities))
        remark = f"without {lacking}" if lacking else ""
        features = pool.features() if pool is not None else None
        return MemberPrediction(self.name, volume, len(self.sessions), self.sessions[0].arithmetic, remark, features)

    def encode(self, case: PreparedCase, regions: FloatArray) -> tuple[FloatArray, ...]:
        """Return the encoder's mean features in regions (R, z, y, x) of the DWI grid, an array (R, D) for each stage.

        Windows lie side by side, of the first network alone. Raises TypeError unless PyTorch runs it with its features told.
        """
        session = self.sessions[0]
        if not (isinstance(session, TorchSession) and session.tap):
            raise TypeError(
                "only a network that PyTorch runs, opened for its features, tells what its encoder's stages give"
            )
        images, spacing, orientation = self.network_input(case)
        array, placement = preprocess(images, spacing, self.plans)
        turned = orientation.apply(regions).transpose(0, *[axis + 1 for axis in placement.transpose_forward])
        shares = torch.nn.functional.interpolate(
            torch.from_numpy(np.ascontiguousarray(turned[:, *placement.box], np.float32))[None],
            size=placement.network_shape,
            mode="trilinear",
        )
        return region_mean_features(
            torch.from_numpy(array), shares[0], session.encoded, self._windows(InferenceSettings())
        )

    def network_input(self, case: PreparedCase) -> tuple[FloatArray, Triple, Reorientation]:
        """Return the input of nnU-Net's preprocessing: images (channels, z, y, x), spacing (z, y, x) in mm, and the reorientation."""
        orientation = self._orientation(case.grid)
        return self._images(case, orientation), orientation.spacing(case.grid.spacing_zyx_mm), orientation

    def _orientation(self, grid: Grid) -> Reorientation:
        if self.spec.orientation == "canonical":
            return grid.canonical()
        if self.plans.reorient:
            return _ras(grid)
        return Reorientation(transpose=(0, 1, 2), flips=())

    def _images(self, case: PreparedCase, orientation: Reorientation) -> FloatArray:
        """Return the input channels (channels, z, y, x) float32 in the orientation that the networks expect."""
        volumes = case.tissue_normalized if self.spec.intensities == "tissue_normalized" else case.images
        nothing = np.zeros_like(volumes[Modality.DWI].array)
        arrays = {
            modality: volumes[modality].array if modality in volumes else nothing for modality in self._modalities
        }
        return np.stack(
            [shift_slices(orientation.apply(arrays[channel.modality]), channel.offset) for channel in self.channels],
            dtype=np.float32,
        )

    def _windows(self, settings: InferenceSettings) -> SlidingWindowConfig:
        z, y, x = (1, *self.plans.patch) if self.plans.dims == 2 else self.plans.patch
        together = window_batch_size(self.plans.window_bytes, self.plans.dims, self.sessions[0].device)
        return SlidingWindowConfig((z, y, x), self.mirror_axes, MirrorMode(settings.tta), batch_size=together)


def _ras(grid: Grid) -> Reorientation:
    """Return the reorientation of arrays (z, y, x) to RAS+: that of `canonical` (LPS+) with x and y flipped."""
    lps = grid.canonical()
    return Reorientation(lps.transpose, tuple(sorted(set(lps.flips) ^ set(lps.transpose[1:]))))


def _channels(spec: MemberSpec, plans: NnunetV2Plans) -> tuple[InputChannel, ...]:
    names = spec.channels or plans.channel_names
    if len(names) != len(plans.channel_names):
        raise WeightsBroken(
            f"member {spec.name} has the wrong number of channels in its manifest entry",
            where=spec.folder,
            found=f"{len(names)} in the entry, {len(plans.channel_names)} in dataset.json",
            do=f"name one image for each channel of dataset.json, in {ENTRY_FILES}",
        )
    try:
        return tuple(parse_channel(name) for name in names)
    except ValueError as error:
        raise WeightsBroken(
            f"it is not clear which images member {spec.name} takes",
            where=spec.folder / "dataset.json",
            found=str(error),
            do=f'name them in {ENTRY_FILES}: "channels": ["DWI", "ADC", ...]',
        ) from error


def _mirror_axes(model: NnunetV2Folder) -> tuple[int, ...]:
    """Return the first checkpoint's mirror axes as axes of a (z, y, x) window (2-D networks count from y); none if missing or None."""
    (path, content), plans = next(iter(model.checkpoints.items())), model.plans
    axes = content.get("inference_allowed_mirroring_axes") or ()
    possible = range(plans.dims)
    if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, int) and axis in possible for axis in axes):
        raise WeightsBroken(
            "a checkpoint names impossible mirror axes",
            where=path,
            found=f"inference_allowed_mirroring_axes {axes}; possible: {', '.join(map(str, possible))}",
            do="use the checkpoint that nnU-Net v2 wrote for these plans",
        )
    return tuple(sorted(int(axis) + 3 - plans.dims for axis in axes))


def network_specs(model: NnunetV2Folder) -> tuple[NetworkSpec, ...]:
    """Describe the networks of a model's folds, without building them. Raises WeightsBroken if the plans describe no network."""
    plans = model.plans
    try:
        window_bytes, what = plans.window_bytes, explain_window_memory(plans.features)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise _unbuildable(model, f"features_per_stage: {type(error).__name__}: {error}") from error
    return tuple(
        NetworkSpec(
            weights=path,
            channels=len(plans.channel_names),
            spacing_mm=plans.spacing_mm,
            patch=plans.patch,
            smallest_window=plans.smallest_window,
            window_bytes=window_bytes,
            memory_of=what,
            build=partial(_with_weights, model, path),
            tap=plans.bottleneck,
        )
        for path in model.checkpoints
    )


def _with_weights(model: NnunetV2Folder, path: Path) -> torch.nn.Module:
    plans, content = model.plans, model.checkpoints[path]
    trainer = str(content.get("trainer_name", ""))
    try:
        network = build_nnunet_v2_network(plans.architecture, len(plans.channel_names), plans.classes, trainer)
    except ValueError as error:
        do = "only nnU-Net's PlainConvUNet and ResidualEncoderUNet are supported"
        raise _unbuildable(model, str(error), do) from error
    load_weights(network, content["network_weights"], path)
    return network


def _unbuildable(model: NnunetV2Folder, found: str, do: str = "") -> WeightsBroken:
    where = model.folder / "plans.json"
    return WeightsBroken("the network that plans.json describes can't be built", where=where, found=found, do=do)
