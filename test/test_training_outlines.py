"""Labels as readers draw them, and lesions put into real brains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SHARED, shared
from training.backgrounds import Background, clean_sides, mirrored, straightened, write_background
from training.batches import Bank
from training.draw import Draw
from training.insertion import with_lesions
from training.lesions import LesionLibrary
from training.outlines import Reader, outline, style

ISOTROPIC = (2.0, 2.0, 2.0)
PLAIN = Reader(share=0.3, widens_small=0.0, widens_large=0.0, border=1.1, sees=1.3)


def ball(shape: tuple[int, int, int], centre: tuple[int, int, int], radius: float) -> torch.Tensor:
    axes = [torch.arange(n) - c for n, c in zip(shape, centre, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return (z**2 + y**2 + x**2 <= radius**2).float()


def test_a_single_bright_voxel_is_outlined_as_three_by_three() -> None:
    damaged, dwi = torch.zeros(9, 12, 12), torch.ones(9, 12, 12)
    damaged[4, 5, 6], dwi[4, 5, 6] = 1, 2
    reader = Reader(0.3, widens_small=1.0, widens_large=0.0, border=1.1, sees=1.3)
    brain = torch.ones(9, 12, 12, dtype=torch.bool)
    sizes = {int(outline(damaged, dwi, brain, ISOTROPIC, Draw(seed), reader).sum()) for seed in range(20)}
    assert 9 in sizes  # 3 x 3 in its slice
    assert min(sizes) >= 5


def test_what_noise_hides_is_not_outlined() -> None:
    damaged = torch.zeros(9, 12, 12)
    damaged[4, 5, 6] = 1
    dwi, brain = 1 + 0.1 * damaged, torch.ones(9, 12, 12, dtype=torch.bool)
    assert not outline(damaged, dwi, brain, ISOTROPIC, Draw(0), PLAIN).any()
    assert outline(damaged, 1 + damaged, brain, ISOTROPIC, Draw(0), PLAIN).any()


def test_large_lesions_lose_their_dull_rim_and_keep_the_fluid_within() -> None:
    damaged = ball((24, 24, 24), (12, 12, 12), 8)
    dwi = 1 + ball((24, 24, 24), (12, 12, 12), 7)
    dwi[12, 12, 12] = 0.4  # a sulcus that the outline encloses
    brain = torch.ones(24, 24, 24, dtype=torch.bool)
    label = outline(damaged, dwi, brain, ISOTROPIC, Draw(0), PLAIN)
    assert label[12, 12, 12] == 1
    assert label.sum() < damaged.sum()
    assert label[12, 12, 20] == 0


def test_outlines_stay_in_the_brain() -> None:
    damaged = ball((12, 12, 12), (6, 6, 6), 2)
    brain = torch.zeros(12, 12, 12, dtype=torch.bool)
    brain[:, :7] = True
    reader = Reader(0.3, 1.0, 1.0, 1.0, 1.0)
    assert not outline(damaged, 1 + damaged, brain, ISOTROPIC, Draw(1), reader)[:, 7:].any()


@pytest.mark.slow
def test_simulated_outlines_are_like_those_of_isles22() -> None:
    """Readers' outlines: 1.09 times background in the faintest tenth, 1.00 in the shell outside (real cases: 1.1-1.2 and 0.95-1.02)."""
    shared("anatomy/synthseg_label_maps.npz.xz")
    shared("lesions/soop_mni_masks.npz.xz")
    from training.simulate import normalised, simulate

    styles = []
    for seed in (500, 503, 507, 508):
        case = simulate(seed, SHARED, lesion_free=False)
        images, label = normalised(case)
        dwi = images[0].astype(np.float32)
        styles.append(style(label, dwi, dwi > 0, float(np.prod(case.spacing_mm)) / 1000))
    assert 1.0 < np.nanmedian([s["faintest_tenth"] for s in styles]) < 1.22
    assert 0.93 < np.nanmedian([s["shell"] for s in styles]) < 1.08


def library() -> LesionLibrary:
    mask = np.zeros((157, 189, 136), np.uint8)
    mask[90:120, 80:110, 50:80] = 1
    packed = np.packbits(mask.reshape(1, -1), axis=1)
    return LesionLibrary(packed, mask.shape, np.array([27.0]), ((0, 130), (6, 185), (6, 150)))  # type: ignore[arg-type]


def healthy_brain() -> torch.Tensor:
    brain = ball((40, 50, 44), (20, 25, 22), 18)
    adc = brain * (1 + 2.5 * ball((40, 50, 44), (20, 25, 22), 4))  # a ventricle
    return torch.stack([brain * torch.exp(-0.75 * (adc - 1)), adc, torch.zeros_like(brain)])


def test_inserted_lesions_are_bright_in_tissue_only_and_leave_the_rest() -> None:
    images = healthy_brain()
    before = images.clone()
    lesioned = 0
    for seed in range(12):
        changed, label = with_lesions(images, ISOTROPIC, library(), Draw(seed))
        assert torch.equal(images, before)
        assert not label[images[0] == 0].any()
        assert not changed[2].any()  # a missing FLAIR stays missing
        csf = images[1] > 2
        assert torch.equal(changed[0][csf], images[0][csf])
        if label.any():
            lesioned += 1
            assert float(changed[0][label > 0].mean()) > 1.1 * float(images[0][label > 0].mean())
    assert lesioned >= 6


def test_a_mirrored_half_is_symmetric_and_takes_nothing_from_the_other_side() -> None:
    images = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    for left in (True, False):
        whole = mirrored(images, left=left)
        assert np.array_equal(whole, whole[..., ::-1])
        kept = slice(0, 3) if left else slice(3, 6)
        assert np.array_equal(whole[..., kept], images[..., kept])


def test_only_halves_without_lesion_are_mirrored() -> None:
    lesion = np.zeros((4, 4, 20), bool)
    assert clean_sides(lesion, ISOTROPIC) == (True, True)
    lesion[0, 0, 3] = True
    assert clean_sides(lesion, ISOTROPIC) == (False, True)
    lesion[0, 0, 9] = True
    assert clean_sides(lesion, ISOTROPIC) == (False, False)


@pytest.mark.parametrize(("shift", "turn"), [(0, 0.0), (5, 0.0), (-3, 0.15)])
def test_the_plane_between_the_hemispheres_is_found(shift: int, turn: float) -> None:
    from scipy import ndimage

    brain = ball((30, 44, 48), (15, 22, 24 + shift), 14).numpy()
    cosine, sine = np.cos(turn), np.sin(turn)
    matrix = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    z, y, x = np.meshgrid(*[np.arange(n) for n in brain.shape], indexing="ij")
    spots = sum(
        np.exp(-((z - 15) ** 2 + (y - 30) ** 2 + (x - 24 - shift - side * 7) ** 2) / 8) for side in (-1, 1)
    ) + np.exp(-((z - 15) ** 2 + (y - 12) ** 2 + (x - 24 - shift) ** 2) / 8)
    image = brain * (1 + spots)
    middle = (np.array(image.shape) - 1) / 2
    image = ndimage.affine_transform(image, matrix, middle - matrix @ middle, order=1)
    images = np.stack([image, image, image]).astype(np.float32)
    straight, _ = straightened(images, np.zeros(brain.shape, bool), ISOTROPIC)
    before = np.abs(images[0] - images[0][..., ::-1]).mean()
    after = np.abs(straight[0] - straight[0][..., ::-1]).mean()
    assert after < 0.03 or after < 0.35 * before


def test_a_bank_mixes_real_backgrounds_in(tmp_path: Path) -> None:
    from test_training_simulator import write_tiny_case

    write_tiny_case(tmp_path, 0)
    write_background(tmp_path, Background("head", healthy_brain().numpy(), ISOTROPIC))
    bank = Bank(tmp_path, tmp_path)
    bank._library = library  # type: ignore[method-assign]
    draw = Draw(0)
    shapes = [tuple(bank.draw(draw, at_2mm=True)[0].shape[1:]) for _ in range(60)]
    assert 5 < sum(shape != (20, 24, 22) for shape in shapes) < 28
    assert len(Bank(tmp_path)._backgrounds) == 0  # without the lesions' folder, simulated patients alone
