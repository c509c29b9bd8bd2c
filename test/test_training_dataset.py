"""Data sets with masks to a bank: found and read as the product does, and refused where anything is not right."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GRID, write_image
from ensemble.types import Modality
from labelled_data import patient, write_isles22
from training import bank
from training.dataset import TABLE, file_name, labelled, main, patient_of


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / TABLE).open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def reasons(out: Path) -> dict[str, str]:
    return {case: row["reason"] for case, row in table(out).items() if row["status"] == "refused"}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isles22(tmp_path_factory.mktemp("release"), range(1, 4), flair=False)


@pytest.fixture(scope="module")
def with_flair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isles22(tmp_path_factory.mktemp("release"), (1,))


def test_isles22_as_it_is_published(with_flair: Path, tmp_path: Path) -> None:
    assert main([str(with_flair), "--out", str(tmp_path / "bank")]) == 0
    rows = table(tmp_path / "bank")
    assert list(rows) == [f"sub-strokecase{number:04d}/ses-0001" for number in (1,)]
    row = rows["sub-strokecase0001/ses-0001"]
    assert (row["patient"], row["status"], row["flair"]) == ("sub-strokecase0001", "used", "1")
    assert (row["manufacturer"], row["model"], row["tesla"]) == ("Maker", "Model", "3")
    _, lesion = patient(1)
    assert float(row["lesion_ml"]) == pytest.approx(lesion.sum() * GRID.voxel_ml, rel=1e-4)
    with np.load(tmp_path / "bank" / row["file"]) as content:
        assert content["label"].sum() == lesion.sum()
        images, label = content["images"].astype(float), content["label"] > 0
        assert content["images_2mm"].shape[1:] == content["label_2mm"].shape
        assert np.median(images[0][label]) == pytest.approx(2, abs=0.1)
        assert np.median(images[1][label]) == pytest.approx(450 / 800, abs=0.05)
        assert np.median(images[2][label]) > 1.2
    assert (tmp_path / "bank" / "dataset.png").stat().st_size > 5000


def test_the_bank_gives_members_what_they_get_at_inference(release: Path, tmp_path: Path) -> None:
    """A scan of the bank is the prepared case, turned and cut."""
    main([str(release), "--out", str(tmp_path)])
    case, label = bank.as_prepared(tmp_path / "case_sub-strokecase0002_ses-0001.npz")
    images, lesion = patient(2)
    assert case.modalities == {Modality.DWI, Modality.ADC}
    assert label.sum() == lesion.sum()
    assert case.grid.spacing_zyx_mm == (5.0, 4.0, 4.0)
    head = images[Modality.DWI] > 0
    place = np.argwhere(lesion).mean(0) - np.argwhere(head).min(0)
    place[1] = np.ptp(np.argwhere(head)[:, 1]) - place[1]  # GRID's y points to posterior
    np.testing.assert_allclose(np.argwhere(label).mean(0), place, atol=0.01)


def test_other_layouts(release: Path, tmp_path: Path) -> None:
    """Folders of cases with a mask beside, a worklist, masks elsewhere: the same bank."""
    folders, lines = tmp_path / "folders", ["case;dwi;adc;mask;patient"]
    for number in (1, 2):
        images, lesion = patient(number)
        for name, image in (("dwi", images[Modality.DWI]), ("adc", images[Modality.ADC]), ("lesion_gt", lesion)):
            write_image(image.astype(np.float32), folders / f"p{number}" / f"{name}.mha")
        lines.append(f"{number};p{number}/dwi.mha;p{number}/adc.mha;p{number}/lesion_gt.mha;one")
    (folders / "list.csv").write_text("\n".join(lines))
    for source in (folders, folders / "list.csv"):
        out = tmp_path / f"bank {source.name}"
        assert main([str(source), "--out", str(out)]) == 0
        assert len(list(out.glob("case_*.npz"))) == 2
    assert {row["patient"] for row in table(out).values()} == {"one"}
    apart = tmp_path / "apart"
    arguments = [str(release / "rawdata"), "--masks", str(release / "derivatives"), "--out", str(apart)]
    assert main(arguments) == 0


@pytest.mark.slow
def test_nnunet_takes_the_raw_folder_unchanged(with_flair: Path, tmp_path: Path) -> None:
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    raw = tmp_path / "Dataset122_Phantoms"
    assert main([str(with_flair), "--out", str(tmp_path / "bank"), "--nnunet-raw", str(raw)]) == 0
    verify(str(raw), num_processes=1)
    described = json.loads((raw / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "DWI", "1": "ADC", "2": "FLAIR"}
    # and is a data set itself: nnU-Net's layout is read as any other
    assert main([str(raw), "--out", str(tmp_path / "again")]) == 0
    first, second = (
        sorted(bank.scan(path).digest for path in (tmp_path / name).glob("*.npz")) for name in ("bank", "again")
    )
    assert first == second


def test_nnunet_gets_no_flair_where_one_case_has_none(tmp_path: Path) -> None:
    write_isles22(tmp_path / "data", [1])
    write_isles22(tmp_path / "data", [2], flair=False)
    raw = tmp_path / "Dataset122_Phantoms"
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "bank"), "--nnunet-raw", str(raw)]) == 0
    assert not list(raw.rglob("*_0002.nii.gz"))
    assert list(json.loads((raw / "dataset.json").read_text())["channel_names"].values()) == ["DWI", "ADC"]


def test_what_is_not_right_is_refused_with_its_reason(release: Path, tmp_path: Path) -> None:
    data = shutil.copytree(release, tmp_path / "data")
    write_isles22(data, range(4, 10), flair=False)
    masks = {n: next(data.glob(f"derivatives/*{n:04d}/*/*_msk.nii.gz")) for n in range(1, 10)}
    masks[1].unlink()
    write_image(np.ones(GRID.shape_zyx, np.uint8), masks[2])
    moved = replace(GRID, origin_mm=(-78.0, -70.5, 12.25))
    write_image(patient(3)[1].astype(np.uint8), masks[3], moved)
    write_image(np.zeros(GRID.shape_zyx, np.uint8), masks[4])  # a patient without lesion
    shutil.copy(masks[5], masks[5].with_name("sub-strokecase0005_ses-0001_mask.nii.gz"))
    corner = np.zeros(GRID.shape_zyx, np.uint8)
    corner[:2, :4, :4] = 1
    write_image(corner, masks[6])
    for kind in ("dwi", "adc"):
        source = next(data.glob(f"rawdata/*0008/*/*_{kind}.nii.gz"))
        shutil.copy(source, next(data.glob(f"rawdata/*0009/*/*_{kind}.nii.gz")))
    out = tmp_path / "bank"
    assert main([str(data), "--out", str(out)]) == 3
    said = {int(case[14:18]): reason for case, reason in reasons(out).items()}
    assert set(said) == {1, 2, 3, 5, 6, 9}
    for number, words in {
        1: "no mask",
        2: "can't be a lesion mask",
        3: "does not lie on the DWI grid",
        5: "which mask",
        6: "outside the brain",
        9: "another patient",
    }.items():
        assert words in said[number]
    assert table(out)["sub-strokecase0004/ses-0001"]["lesion_ml"] == "0"


def test_a_mask_with_other_axes_is_reordered(release: Path, tmp_path: Path) -> None:
    """dcm2niix and others flip axes: the same voxels in another order."""
    data = shutil.copytree(release, tmp_path / "data")
    _, lesion = patient(1)
    corner = GRID.affine @ (GRID.size[0] - 1, 0, 0, 1)
    direction = np.reshape(GRID.direction, (3, 3)) * (-1, 1, 1)
    flipped = replace(GRID, origin_mm=tuple(corner[:3].tolist()), direction=tuple(direction.ravel().tolist()))
    write_image(lesion[:, :, ::-1].astype(np.uint8), next(data.glob("derivatives/*0001/*/*")), flipped)
    for name, source in (("plain", release), ("flipped", data)):
        assert main([str(source), "--out", str(tmp_path / name)]) == 0
    plain, other = (
        np.load(tmp_path / name / "case_sub-strokecase0001_ses-0001.npz")["label"] for name in ("plain", "flipped")
    )
    assert np.array_equal(plain, other)


def test_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """Which is no case; and masks that are called ground truth, or in two words."""
    for number, (place, mask) in enumerate(
        (("images/p1", "masks/p1.nii.gz"), ("p2", "p2/ground_truth.nii.gz"), ("Ä 3", "Ä 3/lesion mask.nii.gz"))
    ):
        root = tmp_path / str(number)
        write_image(patient(1)[1].astype(np.uint8), root / mask)
        for name in ("dwi", "adc"):
            write_image(patient(1)[0][Modality(name)], root / place / f"{name}.nii.gz")
        (one,) = labelled(root, root / "out")
        assert (one.mask, one.problem) == (root / mask, None)
        assert file_name(one.found.name).isascii()


def test_one_mask_is_never_two_scans(tmp_path: Path) -> None:
    """A subject with two sessions, and a mask that doesn't say whose it is; runs, and a mask of the one that isn't taken."""
    for session in (1, 2):
        for name in ("dwi", "adc"):
            image = patient(1)[0][Modality(name)]
            write_image(image, tmp_path / "a" / f"sub-1/ses-{session}/dwi/sub-1_ses-{session}_{name}.nii.gz")
            write_image(image, tmp_path / "b" / f"sub-1/dwi/sub-1_run-{session}_{name}.nii.gz")
    write_image(patient(1)[1].astype(np.uint8), tmp_path / "a" / "derivatives/manual/sub-1/sub-1_mask.nii.gz")
    write_image(patient(1)[1].astype(np.uint8), tmp_path / "b" / "derivatives/manual/sub-1/sub-1_run-1_mask.nii.gz")
    assert [one.mask for one in labelled(tmp_path / "a", tmp_path / "out")] == [None, None]
    assert [one.mask for one in labelled(tmp_path / "b", tmp_path / "out")] == [None]


def test_what_was_predicted_is_no_true_mask(release: Path, tmp_path: Path) -> None:
    data = shutil.copytree(release, tmp_path / "data")
    for mask in data.glob("derivatives/*/*/*"):
        (mask.parent / "report.json").write_text(json.dumps({"tool": {"name": "isles-ensemble"}}))
    assert main([str(data), "--out", str(tmp_path / "bank")]) == 3
    assert all("no mask of the lesion" in reason for reason in reasons(tmp_path / "bank").values())


def test_masks_without_any_lesion_are_refused(release: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(release, tmp_path / "data")
    for mask in data.glob("derivatives/*/*/*"):
        write_image(np.zeros(GRID.shape_zyx, np.uint8), mask)
    assert main([str(data), "--out", str(tmp_path / "bank")]) == 3
    assert "no mask holds a lesion" in capfd.readouterr().err


def test_a_bank_is_never_mixed_with_an_earlier_one(release: Path, tmp_path: Path) -> None:
    assert main([str(release), "--out", str(tmp_path)]) == 0
    assert main([str(release), "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("sub-strokecase0001/ses-0001", "sub-strokecase0001"),
        ("site-a/sub-01/ses-2", "sub-01"),
        ("sub-01_ses-1", "sub-01"),
        ("p17", "p17"),
        ("study/p17", "study/p17"),
    ],
)
def test_scans_of_one_subject_are_one_patients(case: str, patient: str) -> None:
    assert patient_of(case) == patient
