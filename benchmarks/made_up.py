"""Cases of noise, and networks of the published sizes with random weights: masks mean nothing, time and memory do."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ensemble.families.swan.network import WIDTHS
from ensemble.geometry import Grid
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality
from ensemble.volume import Volume

TEST = Path(__file__).resolve().parent.parent / "test"


def made_up_case(
    shape: tuple[int, ...],
    spacing_mm: float = 1.0,
    modalities: Collection[Modality] = (Modality.DWI, Modality.ADC),
) -> PreparedCase:
    """Images (z, y, x) of noise, not zero anywhere, so that nothing is cropped."""
    z, y, x = shape
    grid = Grid((x, y, z), (spacing_mm,) * 3, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    generator = np.random.default_rng(0)
    images = {m: Volume(generator.uniform(1, 2, grid.shape_zyx).astype(np.float32), grid) for m in modalities}
    return PreparedCase("made up", images, images, images, Volume(images[Modality.DWI].array > 0, grid), ())


def write_seals(weights: Path, folds: int) -> None:
    """Write the network that nnU-Net v1 plans for DWI and ADC at 1 mm, 31 million parameters; the other folds are links to the first."""
    sys.path.insert(0, str(TEST))
    from nnunet_v1_folders import PUBLISHED, V1Spec, build_v1_folder

    cube = V1Spec(patch=(128, 128, 128), pools=((2, 2, 2),) * 5, kernels=((3, 3, 3),) * 6, features=32)
    build_v1_folder(weights / PUBLISHED, cube)
    for fold in range(1, folds):
        (weights / PUBLISHED / f"fold_{fold}").symlink_to("fold_0")


def write_swan(weights: Path, folds: int) -> None:
    """Write SWAN's two networks, 29 and 6 million parameters; the other folds are links to the first."""
    sys.path.insert(0, str(TEST))
    from swan_folders import PUBLISHED, build_swan_folder

    build_swan_folder(weights / PUBLISHED, folds=("0",), widths=WIDTHS)
    for fold in range(1, folds):
        (weights / PUBLISHED / f"fold{fold}").symlink_to("fold0")


def write_nvauto(weights: Path, networks: int) -> None:
    """Write MONAI's SegResNet with 32 filters, 19 million parameters, as TorchScript; the others are links to the first."""
    sys.path.insert(0, str(TEST))
    from monai.networks.nets import SegResNet

    from nvauto_files import PUBLISHED, save_script

    network = SegResNet(spatial_dims=3, init_filters=32, in_channels=2, out_channels=2)
    save_script(network, weights / PUBLISHED / "model0.ts")
    for number in range(1, networks):
        (weights / PUBLISHED / f"model{number}.ts").symlink_to("model0.ts")
