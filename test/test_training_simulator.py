"""Simulated patients: reproducible, plausible, and as the networks will meet them; and training that learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SHARED, shared
from training.augment import mirror, rescan
from training.batches import Bank, _disturbed_flair, _window, component_weight, draw_batch, recall_share
from training.draw import Draw
from training.lesions import COUNT_PROBABILITIES, COUNTS, VOLUME_ML, VOLUME_PROBABILITIES
from training.members import MEMBERS, build_network, dataset_json, plans_json
from training.train import Training, export, loss_of, rate_at

TINY = (20, 24, 22)


def write_tiny_case(folder: Path, seed: int, *, thick: bool = False) -> None:
    """A ball of tissue with a bright spot of low ADC, in the bank's format."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in TINY], indexing="ij")
    brain = z**2 + y**2 + x**2 < 1
    at = rng.uniform(-0.4, 0.4, 3)
    lesion = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < 0.05
    noise = rng.normal(1, 0.05, (3, *TINY))
    images = (np.stack([1 + lesion, 1 - 0.5 * lesion, 1 + 0.5 * lesion]) * noise * brain).astype(np.float16)
    content = {
        "images": images,
        "label": lesion.astype(np.uint8),
        "spacing_mm": np.float32([4.8, 1.5, 1.5] if thick else [2, 2, 2]),
    }
    if thick:
        content |= {"images_2mm": images, "label_2mm": content["label"]}
    np.savez(folder / f"case_{seed:07d}.npz", **content)  # type: ignore[arg-type]


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    for seed in range(4):
        write_tiny_case(tmp_path, seed, thick=seed == 3)
    return Bank(tmp_path)


def test_the_same_seed_draws_the_same_numbers() -> None:
    first, second, other = Draw(3), Draw(3), Draw(4)
    assert torch.equal(first.field((5, 6, 7), 3.0), second.field((5, 6, 7), 3.0))
    assert first.uniform(0, 1) == second.uniform(0, 1) != other.uniform(0, 1)


def test_fields_have_unit_spread_and_no_mean() -> None:
    field = Draw(1).field((90, 90, 90), 5.0)
    assert abs(float(field.mean())) < 0.05
    assert float(field.std()) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("probabilities", "values", "median"), [(VOLUME_PROBABILITIES, VOLUME_ML, 6.6), (COUNT_PROBABILITIES, COUNTS, 5.0)]
)
def test_drawn_volumes_and_counts_follow_isles22(
    probabilities: tuple[float, ...], values: tuple[float, ...], median: float
) -> None:
    draw = Draw(0)
    drawn = np.array([draw.quantile(probabilities, values) for _ in range(3000)])
    assert np.median(drawn) == pytest.approx(median, rel=0.15)
    assert np.quantile(drawn, 0.75) == pytest.approx(values[probabilities.index(0.75)], rel=0.15)
    assert drawn.min() >= values[0]
    assert drawn.max() <= values[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("asked_ml", "count"), [(0.2, 1), (0.6, 5), (1.2, 12), (8.0, 3), (60.0, 5)])
def test_lesions_have_the_volume_that_was_drawn(asked_ml: float, count: int) -> None:
    shared("anatomy/synthseg_label_maps.npz.xz")
    shared("lesions/soop_mni_masks.npz.xz")
    from training.anatomy import load_head, random_person
    from training.lesions import Damage, add_acute, load_lesions, tissue_share

    class Asked(Draw):
        def quantile(self, probabilities: Sequence[float], values: Sequence[float]) -> float:
            return asked_ml if values is VOLUME_ML else count

    found = []
    for seed in range(3):
        draw = Asked(seed)
        person = random_person(load_head(SHARED, seed), draw)
        tissue = tissue_share(person.classes)
        damage = Damage.none(tissue)
        add_acute(damage, person, tissue, load_lesions(SHARED), draw)
        found.append(float((damage.acute > 0.5).sum()) / 1000)
    assert asked_ml / 2.2 < float(np.exp(np.log(found).mean())) < asked_ml * 2.2


@pytest.mark.slow
def test_a_simulated_case_is_reproducible_and_plausible() -> None:
    shared("anatomy/synthseg_label_maps.npz.xz")
    shared("lesions/soop_mni_masks.npz.xz")
    from training.simulate import normalised, simulate

    case = simulate(12, SHARED, spacing_mm=(2.0, 2.0, 2.0), lesion_free=False)
    again = simulate(12, SHARED, spacing_mm=(2.0, 2.0, 2.0), lesion_free=False)
    for name in ("dwi", "adc", "flair", "lesion", "brain"):
        assert torch.equal(getattr(case, name), getattr(again, name))
    images, label = normalised(case)
    brain = images[0] > 0
    assert 700 < brain.sum() * 0.008 < 2200
    assert 0.6 < float(case.adc[case.brain].median()) < 1.1
    assert label.any()
    assert images[0][label > 0].mean() > 1.1
    assert not label[~brain].any()


def test_validation_has_its_own_heads_and_lesion_shapes() -> None:
    from training.anatomy import HEADS, HELD_OUT_HEADS, TRAINING_HEADS
    from training.lesions import HELD_OUT_EVERY, LesionLibrary

    assert len(HELD_OUT_HEADS) == 4
    assert sorted((*HELD_OUT_HEADS, *TRAINING_HEADS)) == list(range(HEADS))
    packed = np.arange(40, dtype=np.uint8)[:, None]
    library = LesionLibrary(packed, (2, 2, 2), np.arange(40.0), ((0, 1),) * 3)
    kept, trained = library.part(held_out=True), library.part(held_out=False)
    assert len(kept.volumes_ml) == 40 // HELD_OUT_EVERY
    assert not set(kept.packed.ravel()) & set(trained.packed.ravel())
    assert len(kept.packed) + len(trained.packed) == 40


def test_missing_material_is_named(tmp_path: Path) -> None:
    from training.anatomy import load_head

    with pytest.raises(FileNotFoundError, match="--shared"):
        load_head(tmp_path, 0)


def test_an_empty_bank_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="training.simulate"):
        Bank(tmp_path)


def test_rescanning_keeps_the_background_and_the_input() -> None:
    images = torch.zeros(2, 20, 20, 20)
    images[:, 4:16, 4:16, 4:16] = 1.0
    before = images.clone()
    for seed in range(5):
        assert not rescan(images, Draw(seed))[:, 0].any()
    assert torch.equal(images, before)
    assert not torch.equal(rescan(images, Draw(1)), rescan(images, Draw(2)))


def test_mirroring_moves_images_and_label_together() -> None:
    label = torch.zeros(4, 5, 6)
    label[0, 1, 2] = 1
    for seed in range(8):
        images, flipped = mirror(torch.stack([label, label]), label, Draw(seed))
        assert torch.equal(images[0], flipped)


def test_small_components_weigh_more() -> None:
    label = torch.zeros(30, 30, 30)
    label[2, 2, 2] = 1
    label[10:25, 10:25, 10:25] = 1
    weight = component_weight(label)
    assert weight[2, 2, 2] == 2.0
    assert weight[12, 12, 12] == weight[0, 0, 0] == 1.0


@pytest.mark.parametrize("member", sorted(MEMBERS))
def test_batches_have_the_members_shape(member: str, bank: Bank) -> None:
    spec = MEMBERS[member]
    images, labels, weights, shares = draw_batch(spec, bank, Draw(0))
    assert images.shape == (spec.batch, len(spec.channels), *spec.training_patch)
    assert labels.shape == weights.shape == shares.shape == (spec.batch, *spec.training_patch)
    assert set(labels.unique().tolist()) <= {0.0, 1.0}


def test_flair_is_missing_as_it_is_or_disturbed() -> None:
    """A member that takes FLAIR where there is one must neither need it nor rely on where it lies."""
    brain = torch.zeros(6, 12, 12, dtype=torch.bool)
    brain[1:5, 2:10, 2:10] = True
    flair = torch.rand(brain.shape, generator=torch.Generator().manual_seed(0)) * brain
    shown = [_disturbed_flair(flair, brain, Draw(seed)) for seed in range(200)]
    missing, same = sum(not image.any() for image in shown), sum(torch.equal(image, flair) for image in shown)
    assert 70 < missing < 130
    assert 25 < same < 80
    assert missing + same < 180
    assert not any(image[~brain].any() for image in shown)


def test_loss_prefers_the_truth() -> None:
    label = torch.zeros(2, 4, 8, 8)
    label[0, 1, 2:5, 2:5] = 1
    weight = torch.ones_like(label)
    share = torch.stack([recall_share(one) for one in label])
    right = torch.stack([-10 * (2 * label - 1), 10 * (2 * label - 1)], dim=1)
    assert loss_of(right, label, weight, share) < 0.1 < loss_of(torch.zeros_like(right), label, weight, share)
    assert loss_of(-right, label, weight, share) > loss_of(torch.zeros_like(right), label, weight, share)


def test_each_small_component_counts_alike_in_the_recall() -> None:
    label = torch.zeros(24, 24, 24)
    label[1:3, 1:3, 1:3] = 1  # 8 voxels
    label[1:5, 10:14, 1:5] = 1  # 64
    label[8:20, 8:20, 8:20] = 1  # too large to count
    share = recall_share(label)
    assert float(share.sum()) == pytest.approx(1.0)
    assert float(share[1:3, 1:3, 1:3].sum()) == pytest.approx(0.5)
    assert not share[8:20, 8:20, 8:20].any()
    assert not recall_share(torch.zeros(8, 8, 8)).any()


def test_windows_are_drawn_by_component() -> None:
    """A small lesion far from a large one is in the window about as often: by voxels it would be in one of 200."""
    label = torch.zeros(8, 8, 64)
    label[2:8, 2:8, 2:22] = 1
    label[4, 4, 60] = 1
    images = torch.ones(2, 8, 8, 64)
    spec = replace(MEMBERS["iso3d"], training_patch=(8, 8, 16))
    draw = Draw(0)
    windows = [_window(images, label, torch.ones_like(label), spec.training_patch, draw)[1] for _ in range(200)]
    small = sum(0 < float(window.sum()) <= 1 for window in windows)
    assert 30 < small < 110


def test_frozen_norm_trains_what_is_deployed(bank: Bank) -> None:
    """With frozen statistics, the network in training gives what the exported one gives."""
    spec = replace(MEMBERS["iso3d"], training_patch=(16, 32, 32), features=(8, 8, 8, 8, 8), batch=1)
    training, draw = Training(spec, "cpu"), Draw(0)
    for _ in range(3):
        training.step(*draw_batch(spec, bank, draw), 1e-2)
    training.calibrate_norm(bank, draw)
    training.freeze_norm()
    statistics = {name: value.clone() for name, value in training.network.named_buffers()}
    image = draw_batch(spec, bank, draw)[0]
    with torch.no_grad():
        assert torch.equal(training.network(image), training.network.eval()(image))
    training.network.train()
    training.freeze_norm()
    training.step(*draw_batch(spec, bank, draw), 1e-2)
    assert all(torch.equal(value, statistics[name]) for name, value in training.network.named_buffers())


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    assert rate_at(0.0) < 0.1 * rate_at(0.03)
    assert rate_at(0.5) < rate_at(0.1)
    assert rate_at(1.0) == pytest.approx(0.0, abs=1e-9)


def test_training_learns_stores_and_resumes(bank: Bank, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = replace(MEMBERS["iso3d"], training_patch=(16, 32, 32), features=(8, 8, 8, 8, 8), batch=1)
    training, batch = Training(spec, "cpu"), draw_batch(spec, bank, Draw(0))
    losses = [training.step(*batch, 3e-3)[0] for _ in range(8)]  # of one batch: others are harder or easier
    assert losses[-1] < losses[0]
    training.save_state(tmp_path / "state.pt")
    resumed = Training(spec, "cpu")
    resumed.load_state(tmp_path / "state.pt")
    assert resumed.steps == 8
    for a, b in zip(training.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("member", sorted(MEMBERS))
def test_nnunet_loads_what_is_exported(member: str, tmp_path: Path) -> None:
    predictor = pytest.importorskip("nnunetv2.inference.predict_from_raw_data").nnUNetPredictor
    spec = MEMBERS[member]
    network = build_network(spec).eval()
    export(spec, network, tmp_path)
    checkpoint = torch.load(tmp_path / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["init_args"]["configuration"] == spec.configuration
    loaded = predictor(device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    loaded.initialize_from_trained_model_folder(str(tmp_path), use_folds=(0,))
    image = torch.rand(1, len(spec.channels), *[16] * (spec.dimensions - 1), 32)
    with torch.no_grad():
        assert torch.allclose(loaded.network.eval()(image), network(image), atol=0.02)


def test_plans_name_every_channel() -> None:
    for spec in MEMBERS.values():
        configuration = plans_json(spec)["configurations"][spec.configuration]
        assert len(configuration["normalization_schemes"]) == len(dataset_json(spec)["channel_names"])
        assert set(configuration["normalization_schemes"]) == {"NoNormalization"}
    assert dataset_json(MEMBERS["slice2d"])["channel_names"]["2"] == "DWI[-1]"
