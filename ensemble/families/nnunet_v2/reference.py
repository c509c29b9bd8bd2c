"""nnU-Net's own predictor, for comparison with a member. nnunetv2 is imported only here, and only when a comparison is asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.errors import UsageError
from ensemble.families.base import InferenceSettings, Member
from ensemble.families.nnunet_v2.checkpoints import CHECKPOINT, read_nnunet_v2_folder
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.prepare.case import PreparedCase
from ensemble.types import FloatArray

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class NnunetV2Reference:
    """nnUNetPredictor on a member's model folder."""

    predictor: Callable[..., Any]
    title: str

    @classmethod
    def installed(cls) -> NnunetV2Reference:
        """Import nnunetv2. Raises UsageError if it is not installed."""
        for variable in _FOLDERS:
            os.environ.setdefault(variable, "unused")  # it complains on stdout otherwise
        try:
            from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        except ImportError as error:
            raise UsageError(
                "the comparison needs nnU-Net, which is not installed",
                found=str(error),
                do="run pip install nnunetv2, or remove --compare",
            ) from error
        return cls(nnUNetPredictor, f"nnunetv2 {version('nnunetv2')}")

    def probability(self, member: Member, case: PreparedCase, settings: InferenceSettings) -> FloatArray:
        """Return the lesion probability (z, y, x) on the DWI grid, from the member's own input. Raises what nnunetv2 raises."""
        assert isinstance(member, NnunetV2Member)
        images, spacing, orientation = member.network_input(case)
        device = torch.device(settings.device)
        predictor = self.predictor(
            use_mirroring=settings.tta != "none",
            device=device,
            perform_everything_on_device=device.type == "cuda",
            allow_tqdm=False,
        )
        with _as_trained(member.spec.folder) as folder:
            folds = [path.name.removeprefix("fold_") for path in sorted(folder.glob("fold_*"))]
            predictor.initialize_from_trained_model_folder(str(folder), folds)
        _, classes = predictor.predict_single_npy_array(images, {"spacing": list(spacing)}, None, None, True)
        probability = np.asarray(classes, np.float32)[list(member.plans.lesion_classes)].sum(0)
        return np.ascontiguousarray(orientation.undo(probability))


@contextmanager
def _as_trained(folder: Path) -> Iterator[Path]:
    """Copy a model folder, packed or not, with only the safely read checkpoint contents: nnunetv2 would run code in them."""
    model = read_nnunet_v2_folder(folder)
    with tempfile.TemporaryDirectory(prefix="nnunet-") as made:
        for name in ("dataset.json", "plans.json"):
            shutil.copyfile(folder / name, Path(made) / name)
        for path, content in model.checkpoints.items():
            target = Path(made) / path.parent.name / CHECKPOINT
            target.parent.mkdir()
            kept = {
                "network_weights": content["network_weights"],
                "init_args": {"configuration": model.plans.configuration},
                "trainer_name": str(content.get("trainer_name") or "nnUNetTrainer"),
                "inference_allowed_mirroring_axes": content.get("inference_allowed_mirroring_axes"),
            }
            torch.save(kept, target)
        yield Path(made)
