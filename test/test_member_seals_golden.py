"""The seals member against the peer's recorded output on a real case: same weights, same mask."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import shared
from ensemble.errors import WeightsBroken
from ensemble.families.nnunet_v1 import member as seals
from ensemble.families.nnunet_v1.member import NnunetV1Member
from ensemble.families.nnunet_v1.network import build_nnunet_v1_network
from ensemble.families.nnunet_v1.plans import parse_plans
from ensemble.families.nnunet_v1.processing import grid_at_1mm, postprocess, preprocess
from ensemble.families.probability import lesion_probability_from_softmax
from ensemble.inference.engine import sliding_window_inference
from ensemble.inference.tiling import Tiling
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, Modality
from ensemble.weights.checkpoints import load_weights
from ensemble.weights.pickles import read_pickle
from nnunet_v1_folders import PUBLISHED, V1Spec, v1_description
from test_member_seals import SETTINGS, WEIGHTS, loaded, probability

DWI, ADC = Modality.DWI, Modality.ADC


def golden_member() -> NnunetV1Member:
    return loaded(shared("golden/seals_v1/weights") / PUBLISHED)


def golden_case() -> PreparedCase:
    folder = shared("cases/isles22_0009")
    return prepare_raw(read_case_files("isles22_0009", {DWI: folder / "dwi.nii.gz", ADC: folder / "adc.nii.gz"}))


def golden_softmax() -> AnyArray:
    """The peer's (2, z, y, x) on the DWI grid."""
    with np.load(shared("golden/seals_v1/isles22_0009/fold0/recovered_native_f16.npz")) as file:
        return file[file.files[0]].astype(np.float32)


def assert_agreement(ours: AnyArray, softmax: AnyArray, mask: AnyArray) -> None:
    """Same mask (Dice of at least 0.9999) and softmax (mean absolute difference of at most 1e-3)."""
    lesion = ours > 0.5
    dice = 2 * (lesion & mask).sum() / (lesion.sum() + mask.sum())
    difference = np.abs(ours - softmax[1]).mean()
    assert dice >= 0.9999, f"Dice {dice:.5f}, {(lesion != mask).sum()} voxels differ"
    assert difference <= 1e-3, f"mean absolute softmax difference {difference:.1e}"


def test_golden_preprocessing() -> None:
    """Box, shape and normalisation constants that nnU-Net v1 wrote down for this case."""
    case, plans = golden_case(), parse_plans(v1_description(V1Spec()))
    fine = grid_at_1mm(case.grid)
    images = np.stack([resample_volume(case.images[modality], fine).array for modality in (DWI, ADC)])
    array, placement = preprocess(images, plans)
    assert fine.shape_zyx == (146, 224, 224)
    assert [(part.start, part.stop) for part in placement.box] == [(4, 145), (19, 183), (41, 181)]
    assert array.shape == (2, 141, 164, 140)
    first = tuple(part.start for part in placement.box)
    inside = np.argwhere((array != 0).all(0))[1000]
    value = images[:, *(inside + first)]
    expected = (value - [246.48817443847656, 1.1361160278320312]) / [106.14940643310547, 0.6597697734832764]
    np.testing.assert_allclose(array[:, *inside], expected, rtol=1e-5)


def golden_part(member: NnunetV1Member) -> tuple[AnyArray, AnyArray, AnyArray]:
    """(our probability, the peer's softmax, the peer's mask) in a part of the case, at the cost of eight of its windows.

    Windows overlap, and eight that are neighbours have voxels which no other window covers. Of these parts, the one with most lesion.
    """
    case, softmax = golden_case(), golden_softmax()
    fine = grid_at_1mm(case.grid)
    images = np.stack([resample_volume(case.images[modality], fine).array for modality in (DWI, ADC)])
    array, placement = preprocess(images, member.plans)
    first = [part.start for part in placement.box]
    tiling = Tiling(array.shape[1:], member.plans.patch)  # type: ignore[arg-type]
    mask = softmax[1] > softmax[0]
    parts = []
    for pairs in product(*(pairs_of_starts(tiling, axis) for axis in range(3))):
        # the case has 2 mm voxels: each second one at 1 mm
        native = tuple(
            slice(-(-(a + low) // 2), -(-(a + high) // 2)) for a, (_, _, low, high) in zip(first, pairs, strict=True)
        )
        parts.append((int(mask[native].sum()), pairs, native))
    lesions, pairs, native = max(parts, key=lambda part: part[0])
    assert lesions > 50
    seen = tuple(slice(start, stop) for start, stop, _, _ in pairs)
    answer = sliding_window_inference(
        torch.from_numpy(array[:, *seen].copy()), member.sessions, member.windows(SETTINGS)
    ).numpy()
    whole = np.zeros((2, *array.shape[1:]), np.float32)
    whole[:, *seen] = answer
    ours = lesion_probability_from_softmax(postprocess(whole, placement, member.plans, fine, case.grid))
    return ours[native], softmax[:, *native], mask[native]


def pairs_of_starts(tiling: Tiling, axis: int) -> list[tuple[int, int, int, int]]:
    """Of each two neighbouring windows along an axis: where they begin and end, and the range that no third one covers."""
    length = tiling.window[axis]
    starts = sorted({window[axis].start for window in tiling.windows()})
    return [
        (
            starts[i],
            starts[i + 1] + length,
            starts[i - 1] + length if i else starts[i],
            starts[i + 2] if i + 2 < len(starts) else starts[i + 1] + length,
        )
        for i in range(len(starts) - 1)
    ]


@pytest.mark.slow
def test_golden_part() -> None:
    assert_agreement(*golden_part(golden_member()))


@pytest.mark.slow
def test_the_comparison_fails_when_one_weight_is_perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_perturbed(network: torch.nn.Module, *rest: Any) -> None:
        load_weights(network, *rest)
        head = dict(network.named_parameters())["seg_outputs.3.weight"].view(-1)
        with torch.no_grad():
            head[head.abs().argmax()] *= 1.1

    monkeypatch.setattr(seals, "load_weights", load_perturbed)
    with pytest.raises(AssertionError, match="Dice|softmax difference"):
        assert_agreement(*golden_part(golden_member()))


@pytest.mark.slow
def test_golden_case() -> None:
    """The whole case: 100 windows, 8 flips."""
    mask_file = shared("golden/seals_v1/isles22_0009/lesion_msk_fold0.nii.gz")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(mask_file))) > 0
    assert mask.sum() == 2030
    assert_agreement(probability(golden_member(), golden_case()), golden_softmax(), mask)


def test_published_weights_load_exactly() -> None:
    """All names and shapes of the peer's network, the heads of deep supervision included."""
    checkpoint = shared("golden/seals_v1/weights") / PUBLISHED / WEIGHTS
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    network = build_nnunet_v1_network(parse_plans(read_pickle(checkpoint.with_name(f"{checkpoint.name}.pkl"))))
    load_weights(network, state, checkpoint)
    assert {f"module.{name}" for name in network.state_dict()} == set(state)
    with pytest.raises(WeightsBroken, match="does not fit"):
        load_weights(
            network, {name: tensor for name, tensor in state.items() if "seg_outputs.0" not in name}, checkpoint
        )
