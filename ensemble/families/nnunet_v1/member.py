"""Member kind `seals`: nnU-Net v1 models, run as DeepISLES runs those of SEALS, the ISLES'22 winner.

The published checkpoints (de la Rosa et al., DeepISLES; Gao et al., SEALS) drop in unchanged and give DeepISLES' mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings, MemberPrediction, NetworkSpec, PartialProgress
from ensemble.families.channels import parse_channel
from ensemble.families.nnunet_v1.checkpoints import read_nnunet_v1_weights
from ensemble.families.nnunet_v1.folder import NnunetV1Folder, read_nnunet_v1_folder
from ensemble.families.nnunet_v1.network import build_nnunet_v1_network
from ensemble.families.nnunet_v1.plans import NnunetV1Plans
from ensemble.families.nnunet_v1.processing import grid_at_1mm, postprocess, preprocess
from ensemble.families.probability import lesion_probability_from_softmax
from ensemble.families.sessions import open_sessions
from ensemble.families.spec import ENTRY_FILES, MemberSpec, require_native_images
from ensemble.families.unet import explain_window_memory
from ensemble.geometry import Grid
from ensemble.inference.capacity import buffer_device, window_batch_size
from ensemble.inference.engine import Averaging, MirrorMode, SlidingWindowConfig, sliding_window_inference
from ensemble.inference.session import LoadedSession
from ensemble.prepare.case import PreparedCase
from ensemble.resample import resample_volume
from ensemble.types import FloatArray, Modality, ProgressCallback
from ensemble.weights.checkpoints import load_weights

MIRROR_AXES = (0, 1, 2)


@dataclass(frozen=True)
class NnunetV1Member:
    """A trained model with the networks of all folds in memory."""

    spec: MemberSpec
    plans: NnunetV1Plans
    modalities: tuple[Modality, ...]
    """What each input channel shows."""
    sessions: tuple[LoadedSession, ...]
    """One for each fold."""

    @classmethod
    def load(cls, spec: MemberSpec, settings: InferenceSettings) -> NnunetV1Member:
        """Read a model folder and load its networks onto the device.

        Raises WeightsBroken, naming file and finding, if anything is missing, damaged, contradictory or not supported.
        """
        require_native_images(spec)
        folder = read_nnunet_v1_folder(spec.folder)
        modalities = _modalities(spec, folder.plans)
        sessions = open_sessions(spec, network_specs(folder), settings)
        return cls(spec, folder.plans, modalities, sessions)

    @property
    def name(self) -> str:
        """The name under which it votes."""
        return self.spec.name

    @property
    def requires(self) -> frozenset[Modality]:
        """The images that it can't do without."""
        return frozenset(self.modalities)

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Return the lesion probability on the DWI grid. Each fold's softmax is resampled to that grid before folds are averaged.

        Networks stay on the device they were loaded to. Raises NonFiniteLogits, or what torch raises.
        """
        fine = grid_at_1mm(case.grid)
        array, placement = preprocess(self._images(case, fine), self.plans)
        device = self.sessions[0].device
        buffers = buffer_device(array[0].nbytes * (len(array) + 3), device)
        image, windows = torch.from_numpy(array).to(buffers), self.windows(settings)
        total = np.zeros((2, *case.grid.shape_zyx), np.float32)
        for fold, session in enumerate(self.sessions):
            softmax = sliding_window_inference(
                image, [session], windows, PartialProgress(progress, fold, len(self.sessions))
            )
            total += postprocess(softmax.cpu().numpy(), placement, self.plans, fine, case.grid)
        probability = lesion_probability_from_softmax(total / np.float32(len(self.sessions)))
        volume = case.images[Modality.DWI].like(probability)
        return MemberPrediction(self.name, volume, len(self.sessions), self.sessions[0].arithmetic)

    def windows(self, settings: InferenceSettings) -> SlidingWindowConfig:
        """Return the sliding-window configuration of its networks."""
        together = window_batch_size(self.plans.window_bytes, len(self.plans.patch), self.sessions[0].device)
        return SlidingWindowConfig(
            self.plans.patch, MIRROR_AXES, MirrorMode(settings.tta), Averaging.PROBABILITIES, batch_size=together
        )

    def _images(self, case: PreparedCase, fine: Grid) -> FloatArray:
        """Return the input channels (channels, z, y, x) float32 at 1 mm."""
        return np.stack([resample_volume(case.as_read[modality], fine).array for modality in self.modalities])


def _modalities(spec: MemberSpec, plans: NnunetV1Plans) -> tuple[Modality, ...]:
    names = spec.channels or plans.modalities
    try:
        channels = [parse_channel(name) for name in names]
        if len(channels) != len(plans.modalities):
            raise ValueError(f"{len(channels)} channels in its manifest entry, {len(plans.modalities)} in the plans")
        if any(channel.offset for channel in channels):
            raise ValueError("neighbouring slices are not supported at 1 mm")
        if any(channel.optional for channel in channels):
            raise ValueError("optional images are not supported")
    except ValueError as error:
        raise WeightsBroken(
            f"it is not clear which images member {spec.name} takes",
            where=spec.folder,
            found=str(error),
            do=f'name them in {ENTRY_FILES}: "channels": ["DWI", "ADC"]',
        ) from error
    return tuple(channel.modality for channel in channels)


def network_specs(folder: NnunetV1Folder) -> tuple[NetworkSpec, ...]:
    """Describe the networks of a model's folds, without building them."""
    plans = folder.plans
    return tuple(
        NetworkSpec(
            weights=path,
            channels=len(plans.modalities),
            spacing_mm=plans.spacing_mm,
            patch=plans.patch,
            smallest_window=plans.smallest_window,
            window_bytes=plans.window_bytes,
            memory_of=explain_window_memory(plans.base_features),
            build=partial(_with_weights, plans, path),
        )
        for path in folder.weights.values()
    )


def _with_weights(plans: NnunetV1Plans, path: Path) -> nn.Module:
    network = build_nnunet_v1_network(plans)
    load_weights(network, read_nnunet_v1_weights(path), path)
    return network
