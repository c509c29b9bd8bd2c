"""Member kind `nvauto`: the networks of NVAUTO (Myronenko, Siddiquee, Yang, He, Xu: ISLES'22), run as DeepISLES runs them.

The published files are used unchanged and give DeepISLES' mask. Each network runs on the image at 1 mm; its softmax is resampled to the DWI
grid, where networks are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings, MemberPrediction, NetworkSpec, PartialProgress
from ensemble.families.channels import parse_channel
from ensemble.families.nvauto.folder import SCRIPT_SUFFIX, require_network_files
from ensemble.families.nvauto.processing import SPACING_MM, ResampleTo1Mm, normalise_channels
from ensemble.families.nvauto.rebuild import read_segresnet_config, rebuild_network
from ensemble.families.nvauto.script import TorchScriptSession, refuse_untrusted_torchscript
from ensemble.families.probability import lesion_probability_from_softmax
from ensemble.families.sessions import SequentialSessions, open_sequential_sessions, open_session
from ensemble.families.spec import ENTRY_FILES, MemberSpec, require_native_images
from ensemble.families.unet import explain_window_memory, window_bytes
from ensemble.inference.capacity import buffer_device, window_batch_size
from ensemble.inference.engine import SlidingWindowConfig, sliding_window_inference
from ensemble.inference.precision import resolve_precision
from ensemble.inference.session import LoadedSession
from ensemble.inference.tiling import Blending, TilingConvention
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback

#: Voxels of a window along x, y, z, and how windows are put together.
WINDOW = (192, 192, 128)
BLENDING = Blending(step=1 - 0.625, sigma=0.125, convention=TilingConvention.MONAI)
CHANNELS = (Modality.ADC, Modality.DWI)


@dataclass(frozen=True)
class NvautoMember:
    """The networks of NVAUTO, in memory or opened when needed."""

    spec: MemberSpec
    modalities: tuple[Modality, ...]
    """What each input channel shows."""
    sessions: SequentialSessions
    window_bytes: int
    """Memory that the activations of one window take."""

    @classmethod
    def load(cls, spec: MemberSpec, settings: InferenceSettings) -> NvautoMember:
        """Open each network once, and keep them in memory if they are few.

        Raises WeightsBroken for TorchScript without permission, and if anything is missing, damaged or not supported.
        """
        modalities = _modalities(spec)
        files = list(require_network_files(spec.folder).values())
        if not settings.packed_form:
            refuse_untrusted_torchscript(spec, files, settings)
        networks = network_specs(spec.folder)
        if wrong := [network for network in networks if network.channels != len(modalities)]:
            raise WeightsBroken(
                f"member {spec.name} has the wrong number of channels",
                where=wrong[0].weights,
                found=f"{wrong[0].channels} in the network, {len(modalities)} images ({', '.join(spec.channels or CHANNELS)})",
                do="use NVAUTO's own networks, which take ADC and DWI",
            )
        sessions = open_sequential_sessions(spec, networks, settings, _opened)
        return cls(spec, modalities, sessions, max(network.window_bytes for network in networks))

    @property
    def name(self) -> str:
        """The name under which it votes."""
        return self.spec.name

    @property
    def requires(self) -> frozenset[Modality]:
        """The images that it can't do without."""
        return frozenset(self.modalities)

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Return the lesion probability on the DWI grid.

        Networks stay on the device they were loaded to, or go through it in turn. Raises NonFiniteLogits, or what torch raises.
        """
        respacing, device = ResampleTo1Mm.of(case.grid), self.sessions.device
        images = np.stack([case.as_read[modality].array.transpose() for modality in self.modalities], dtype=np.float32)
        fine = normalise_channels(respacing.forward(torch.from_numpy(images)))
        fine = fine.to(buffer_device(fine[0].nbytes * (len(fine) + 3), device))
        how = SlidingWindowConfig(WINDOW, blending=BLENDING, batch_size=window_batch_size(self.window_bytes, 3, device))
        total = np.zeros((2, *case.grid.size), np.float32)
        for turn, session in enumerate(self.sessions):
            logits = sliding_window_inference(fine, [session], how, PartialProgress(progress, turn, len(self.sessions)))
            if len(logits) != 2:
                raise ValueError(f"a network gives {len(logits)} classes, background and lesion are expected")
            total += respacing.back(logits.softmax(0).cpu()).numpy()
        probability = np.ascontiguousarray(
            lesion_probability_from_softmax(total / np.float32(len(self.sessions))).transpose()
        )
        volume = case.images[Modality.DWI].like(probability)
        return MemberPrediction(self.name, volume, len(self.sessions), self.sessions.arithmetic)


def network_specs(folder: Path) -> tuple[NetworkSpec, ...]:
    """Describe the networks of a folder, packed or not, without running any of their code. Raises WeightsBroken."""
    return tuple(_network(path) for path in require_network_files(folder).values())


def _network(path: Path) -> NetworkSpec:
    form = read_segresnet_config(path)
    return NetworkSpec(
        weights=path,
        channels=form.channels,
        spacing_mm=SPACING_MM,
        patch=WINDOW,
        smallest_window=form.smallest_window,
        window_bytes=window_bytes(WINDOW, form.features),
        memory_of=explain_window_memory(form.features),
        build=partial(rebuild_network, path),
    )


def _opened(network: NetworkSpec, settings: InferenceSettings) -> LoadedSession:
    if network.weights.suffix != SCRIPT_SUFFIX or settings.packed_form:
        return open_session(network, replace(settings, tta="none"))  # never mirrored, so no gate to be coarse for
    device = torch.device(settings.device)
    precision = resolve_precision(settings.precision, device)
    return TorchScriptSession(network.weights, channels=network.channels, device=device, precision=precision)


def _modalities(spec: MemberSpec) -> tuple[Modality, ...]:
    require_native_images(spec)
    try:
        channels = [parse_channel(name) for name in spec.channels] if spec.channels else []
        if any(channel.offset or channel.optional for channel in channels):
            raise ValueError("these networks support neither neighbouring slices nor optional images")
    except ValueError as error:
        raise WeightsBroken(
            f"it is not clear which images member {spec.name} takes",
            where=spec.folder,
            found=str(error),
            do=f'leave "channels" out of {ENTRY_FILES} (the default is ADC, then DWI)',
        ) from error
    return tuple(channel.modality for channel in channels) or CHANNELS
