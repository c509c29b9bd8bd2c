"""The shipped members are nnU-Net v2 model folders: nnUNetPredictor loads them too, and says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import REPOSITORY
from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.members.manifest import find_members
from ensemble.types import ignore_progress
from nnunet_folders import small_case
from test_member_nnunet import predictor, sum_in_float32


def shipped() -> list[MemberSpec]:
    return [spec for spec in find_members(REPOSITORY / "model_weights") if spec.kind == "nnunet"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", shipped(), ids=lambda spec: spec.name)
def test_same_as_nnunet(spec: MemberSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case((20, 40, 36), (4.0, 3.0, 3.0))
    settings = InferenceSettings(tta="none")
    member = NnunetV2Member.load(spec, settings)
    probability = member.predict(case, settings, ignore_progress).probability.array
    # what nnUNetPredictor is to be given is what the manifest says: these intensities, these slices (the case's axes are canonical)
    images = member._images(case, case.grid.canonical())
    sum_in_float32(monkeypatch)
    reference = predictor(spec.folder)
    reference.use_mirroring = False
    with torch.inference_mode():
        _, expected = reference.predict_single_npy_array(
            images, {"spacing": list(case.grid.spacing_zyx_mm)}, None, None, True
        )
    np.testing.assert_allclose(probability, expected[1], rtol=0, atol=1e-4)
