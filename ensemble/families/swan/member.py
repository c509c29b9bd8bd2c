"""Member kind `swan`: the networks of team SWAN (factorizer-isles22), run as DeepISLES runs them.

The published checkpoints (de la Rosa et al., DeepISLES; Ashtari et al., Factorizer) drop in unchanged. One thing is other than in the
original, which leaves dropout on by an oversight: here it is off, so that a case gives one mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.channels import InputChannel, parse_channel
from ensemble.families.sessions import open_sessions
from ensemble.families.spec import ENTRY_FILES, MemberSpec
from ensemble.families.swan.checkpoints import SPACING_MM, network_specs
from ensemble.families.swan.folder import read_swan_folder
from ensemble.families.swan.network import WINDOW
from ensemble.families.swan.processing import postprocess, preprocess
from ensemble.families.unet import window_bytes
from ensemble.inference.capacity import buffer_device, window_batch_size
from ensemble.inference.engine import MirrorMode, SlidingWindowConfig, sliding_window_inference
from ensemble.inference.session import LoadedSession
from ensemble.inference.tiling import Blending, TilingConvention
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback

#: Windows at every 32nd voxel, all voxels of each alike.
_BLENDING = Blending(step=0.5, sigma=None, convention=TilingConvention.MONAI)
MODALITIES = (Modality.DWI, Modality.ADC, Modality.FLAIR)


@dataclass(frozen=True)
class SwanMember:
    """The networks of all folds, in memory."""

    spec: MemberSpec
    sessions: tuple[LoadedSession, ...]
    """One for each network."""
    missing: str
    """Which of the published networks are not there."""

    @classmethod
    def load(cls, spec: MemberSpec, settings: InferenceSettings) -> SwanMember:
        """Read a folder and load its networks onto the device. Raises WeightsBroken."""
        _refuse_choices(spec)
        folder = read_swan_folder(spec.folder)
        return cls(spec, open_sessions(spec, network_specs(folder), settings), folder.missing)

    @property
    def name(self) -> str:
        """The name under which it votes."""
        return self.spec.name

    @property
    def requires(self) -> frozenset[Modality]:
        """The images that it can't do without."""
        return frozenset(MODALITIES)

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Return the lesion probability on the DWI grid: the mean logit over networks and overlapping windows.

        Networks stay on the device they were loaded to. Raises InputRefused, NonFiniteLogits, or what torch raises.
        """
        array = preprocess([case.as_read[modality].array for modality in MODALITIES], case.grid)
        device = self.sessions[0].device
        buffers = buffer_device(array[0].nbytes * (len(array) + 3), device)
        logits = sliding_window_inference(array.to(buffers), self.sessions, self.windows, progress)
        probability = postprocess(logits[1] - logits[0], case.grid)
        volume = case.as_read[Modality.DWI].like(probability)
        return MemberPrediction(self.name, volume, len(self.sessions), self.sessions[0].arithmetic, self.missing)

    @property
    def windows(self) -> SlidingWindowConfig:
        """The sliding-window configuration. Nothing is mirrored, as in DeepISLES; training used mirroring."""
        together = window_batch_size(window_bytes(WINDOW, 32), 3, self.sessions[0].device)
        return SlidingWindowConfig(WINDOW, tta=MirrorMode.NONE, blending=_BLENDING, batch_size=together)


def _refuse_choices(spec: MemberSpec) -> None:
    """Raise WeightsBroken if the manifest asks for other images than those the networks were trained on."""
    try:
        channels = [parse_channel(name) for name in spec.channels or MODALITIES]
        wanted = channels == [InputChannel(modality) for modality in MODALITIES]
    except ValueError:
        wanted = False
    plain = (spec.intensities, spec.orientation, spec.spacing_mm or SPACING_MM) == ("native", "native", SPACING_MM)
    if not wanted or not plain:
        raise WeightsBroken(
            f"member {spec.name} only accepts DWI, ADC and FLAIR as read, at 2 mm",
            where=spec.folder,
            found=f"channels {', '.join(spec.channels or MODALITIES)}; {spec.intensities} intensities, {spec.orientation}"
            f" orientation, spacing {spec.spacing_mm or SPACING_MM} in its manifest entry",
            do=f"remove these settings from {ENTRY_FILES}",
        )
