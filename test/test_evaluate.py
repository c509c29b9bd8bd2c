"""`evaluate`: the ISLES'22 measures against a second implementation, pairing, refusals and what is written."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import cc3d
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import gaussian_filter

from conftest import GRID, tree, write_image
from ensemble.batch.find import find_cases
from ensemble.cli import main
from ensemble.errors import InputRefused
from ensemble.evaluate.pairs import find_pairs
from ensemble.evaluate.scores import Score, score_masks, score_pair
from ensemble.evaluate.statistics import summarise
from ensemble.outputs.layouts.bids_entities import assign_entities
from ensemble.readers.names import stem
from ensemble.text import replace_undecodable
from ensemble.types import AnyArray, Modality

SPACING_ZYX_MM = (5.0, 2.0, 1.5)
Voxel = tuple[int, int, int]


# A second implementation, on sets of coordinates: nothing of it comes from numpy, scipy or ensemble.metrics.


def lesions(mask: set[Voxel]) -> list[set[Voxel]]:
    """Components in which each voxel touches another by face, edge or corner, by walking from neighbour to neighbour."""
    left, found = set(mask), []
    while left:
        front = [left.pop()]
        lesion = set(front)
        while front:
            z, y, x = front.pop()
            for dz, dy, dx in product((-1, 0, 1), repeat=3):
                if (neighbour := (z + dz, y + dy, x + dx)) in left:
                    left.remove(neighbour)
                    lesion.add(neighbour)
                    front.append(neighbour)
        found.append(lesion)
    return found


def by_hand(truth: set[Voxel], prediction: set[Voxel]) -> dict[str, float]:
    true, predicted = lesions(truth), lesions(prediction)
    hit = sum(1 for lesion in true if lesion & prediction)
    false = sum(1 for lesion in predicted if not lesion & truth)
    voxel_ml = SPACING_ZYX_MM[0] * SPACING_ZYX_MM[1] * SPACING_ZYX_MM[2] / 1000
    both_empty = not truth and not prediction
    return {
        "dice": 1.0 if both_empty else 2 * len(truth & prediction) / (len(truth) + len(prediction)),
        "lesion_f1": 1.0 if both_empty else hit / (hit + (false + len(true) - hit) / 2),
        "avd_ml": abs(len(truth) - len(prediction)) * voxel_ml,
        "alcd": abs(len(true) - len(predicted)),
    }


def voxels(mask: AnyArray) -> set[Voxel]:
    return {(int(z), int(y), int(x)) for z, y, x in np.argwhere(mask)}


def random_pairs() -> Iterator[tuple[AnyArray, AnyArray]]:
    """Specks, blobs and empty masks, alike, unlike and apart."""
    rng = np.random.default_rng(7)
    for number in range(400):
        shape = tuple(int(n) for n in rng.integers(1, 11, 3))
        fields = rng.normal(size=(2, *shape))
        if number % 2:
            fields = np.stack([gaussian_filter(field, 1.0) for field in fields])
            fields /= fields.std() or 1.0
        if number % 3 == 0:
            fields[1] = fields[0] + 0.3 * fields[1]
        levels = rng.uniform(0.5, 3.5, 2)
        yield fields[0] > levels[0], fields[1] > levels[1]


def test_the_measures_agree_with_a_second_implementation_on_hundreds_of_masks() -> None:
    seen = set()
    for truth, prediction in random_pairs():
        score = score_masks("x", truth, prediction, SPACING_ZYX_MM)
        expected = by_hand(voxels(truth), voxels(prediction))
        assert {name: getattr(score, name) for name in expected} == pytest.approx(expected)
        assert score.truth_lesions == cc3d.connected_components(truth, connectivity=26).max()  # the organisers' library
        assert score.false_lesions + score.missed_lesions >= 0
        seen.add((truth.any(), prediction.any(), expected["lesion_f1"] not in (0, 1)))
    assert len(seen) == 5, "empty, one-sided and mixed pairs must all have come up"


@pytest.mark.parametrize("wrong", ["dice", "lesion_f1", "avd_ml", "alcd"])
def test_the_comparison_notices_a_wrong_measure(wrong: str) -> None:
    truth, prediction = next((t, p) for t, p in random_pairs() if t.sum() > 9 and (t & p).sum() > 2 and (t ^ p).any())
    prediction = prediction.copy()
    prediction[tuple(np.argwhere(truth & prediction)[0])] = False
    score = score_masks("x", truth, prediction, SPACING_ZYX_MM)
    score = replace(score, **{wrong: getattr(score, wrong) + 0.01})
    assert getattr(score, wrong) != pytest.approx(by_hand(voxels(truth), voxels(prediction))[wrong])


def mask(*places: Voxel) -> AnyArray:
    array = np.zeros(GRID.shape_zyx, np.uint8)
    for place in places:
        array[place] = 1
    return array


A, B, C = (2, 2, 2), (9, 9, 9), (20, 30, 30)


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases with figures that can be counted: a perfect one, one of two lesions found, and an empty one with a false alarm."""
    for case, truth, prediction in (("p1", mask(A), mask(A)), ("p2", mask(A, B), mask(B)), ("p3", mask(), mask(C))):
        write_image(truth, tmp_path / "truth" / case / "lesion_gt.nii.gz")
        write_image(prediction, tmp_path / "predicted" / f"{case}.mha")
    return tmp_path / "predicted", tmp_path / "truth"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_the_summary_and_the_picture(masks: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "metrics.csv"
    assert main(["evaluate", *map(str, masks), "--out", str(out)]) == 0
    assert set(tree(out.parent)) == {"metrics.csv", "metrics_summary.csv", "metrics_plots.png"}
    table = {row["case"]: row for row in rows(out)}
    names = ("dice", "lesion_f1", "avd_ml", "alcd", "missed_lesions", "false_lesions")
    assert {case: [float(row[name]) for name in names] for case, row in table.items()} == {
        "p1": [1, 1, 0, 0, 0, 0],
        "p2": [pytest.approx(2 / 3, abs=1e-5), pytest.approx(2 / 3, abs=1e-5), 0.08, 1, 1, 0],
        "p3": [0, 0, 0.08, 1, 0, 1],
    }
    summary = {(row["group"], row["measure"]): row for row in rows(out.parent / "metrics_summary.csv")}
    whole = summary["all cases", "dice"]
    assert float(whole["mean"]) == pytest.approx(5 / 9, abs=1e-5)
    assert float(whole["median"]) == pytest.approx(2 / 3, abs=1e-5)
    assert (float(whole["mean_ci_low"]), float(whole["mean_ci_high"])) == (0, 1)
    assert summary["cases without lesion", "alcd"]["n"] == "1"
    assert float(summary["lesions up to 0.1 ml", "found"]["mean"]) == pytest.approx(2 / 3, abs=1e-5)
    assert imread(out.parent / "metrics_plots.png").std() > 0.05


@pytest.mark.slow
def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """100 draws of 40 cases: a 95 % interval holds the true mean in most, and not in nearly all."""
    rng, held = np.random.default_rng(1), 0
    blank = Score("x", 0, 0, 0, 0, 5.0, 5.0, 1, 1, 0, 0, (), ())
    for _ in range(20):
        drawn = summarise([replace(blank, dice=value) for value in rng.beta(4, 2, 40)])
        held += drawn[0].mean_ci_low <= 4 / 6 <= drawn[0].mean_ci_high
    assert 16 <= held <= 20


def test_what_can_not_be_measured_is_named_and_the_rest_is_measured(
    masks: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted, truth = masks
    write_image(mask(A), predicted / "p1.mha", replace(GRID, origin_mm=(0.0, 0.0, 0.0)))
    write_image(np.linspace(0, 1, mask().size, dtype=np.float32).reshape(mask().shape), predicted / "p2.mha")
    write_image(mask(A), truth / "p4" / "lesion_gt.nii.gz")
    (truth / "p5").mkdir()
    (truth / "p5" / "lesion_gt.nii.gz").write_bytes((truth / "p4" / "lesion_gt.nii.gz").read_bytes()[:200])
    write_image(mask(A), predicted / "p5.mha")
    write_image(mask(A), predicted / "p6.mha")
    assert main(["evaluate", *map(str, masks), "--out", str(tmp_path / "metrics.csv")]) == 3
    said = {row["case"]: row["status"] for row in rows(tmp_path / "metrics.csv")}
    assert said["p3"] == "measured"
    for case, part in (
        ("p1", "different grids"),
        ("p2", "not a binary mask"),
        ("p4", "no predicted mask"),
        ("p5", "truncated"),
    ):
        assert part in said[case]
    out = capsys.readouterr().out
    assert "1 of 5 cases measured" in out
    assert "skipped, because they have no true mask: p6" in out


def test_grids_that_differ_by_rounding_are_one(tmp_path: Path) -> None:
    shifted = replace(GRID, origin_mm=(GRID.origin_mm[0] + 0.01, *GRID.origin_mm[1:]))
    truth, predicted = write_image(mask(A), tmp_path / "t.nii.gz"), write_image(mask(A), tmp_path / "p.nii.gz", shifted)
    assert main(["evaluate", str(predicted), str(truth), "--out", str(tmp_path / "m.csv")]) == 0


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        ("sub-a1/ses-2/sub-a1_ses-2_space-dwi_label-lesion_mask.nii.gz", "derivatives/sub-a1/ses-2/sub-a1_ses-2_msk.nii.gz"),
        ("sub-a1/sub-a1_space-dwi_label-lesion_mask.nii.gz", "sub-a1/dwi/sub-a1_space-TRACE_desc-lesion_mask.nii.gz"),
        ("sub-a1/ses-2/mask.nii.gz", "derivatives/sub-a1/ses-2/sub-a1_ses-2_desc-lesion_mask.nii.gz"),
        ("sub-a1_run-1_mask.nii.gz", "sub-a1/anat/sub-a1_acq-x_run-01_label-L_mask.nii.gz"),
        ("a_1/mask.nii.gz", "a_1.nii.gz"),
        ("a_1/images/stroke-lesion-segmentation/0f3e.mha", "a_1_seg.mha"),
        ("images/stroke-lesion-segmentation/a_1.mha", "gt/a_1.mha"),
        ("a_1/images/stroke-lesion-segmentation/x.mha", "a_1/images/y/z_seg.mha"),
        ("a1.mha", "labels/a1.mha"),
        ("preds/a1.mha", "labels/a1.mha"),
        ("site 2/a1/mask.mha", "site 2/a1_gt.nii.gz"),
        ("a1.mha", "site 2/a1/lesion_gt.nii.gz"),
        ("a_1_seg.mha", "a_1_seg.nii.gz"),
    ],
)  # fmt: skip
def test_masks_find_each_other(tmp_path: Path, prediction: str, truth: str) -> None:
    for root, name in (("p", prediction), ("t", truth)):
        for other in (name, name.replace("a1", "b7").replace("a_1", "b_7").replace("a-1", "b-7")):
            path = tmp_path / root / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.with_name("x_dwi.nii.gz").touch()
            path.with_name("sub-q_label-lesion_desc-member_mask.nii.gz").touch()
            path.with_name("sub-q_desc-brain_mask.nii.gz").touch()
    pairs, without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert not without
    assert [(len(pair.truth), len(pair.predictions)) for pair in pairs] == [(1, 1), (1, 1)]
    assert pairs[0].truth == (tmp_path / "t" / truth,)
    assert pairs[0].predictions == (tmp_path / "p" / prediction,)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        ("1_1.nii.gz", "11.nii.gz"),
        ("张伟.nii.gz", "李娜.nii.gz"),
        ("Müller.nii.gz", "Möller.nii.gz"),
        ("Case1.nii.gz", "case1.nii.gz"),
        ("case1.nii.gz", "case10.nii.gz"),
        ("a-1.nii.gz", "a_1.nii.gz"),
        ("a 1/mask.nii.gz", "a1/mask.nii.gz"),
        ("sub-01_mask.nii.gz", "sub-1_mask.nii.gz"),
        ("sub-1_ses-1_mask.nii.gz", "sub-1_mask.nii.gz"),
        ("sub-1_ses-1_mask.nii.gz", "sub-1_ses-01_mask.nii.gz"),
        ("sub-1_run-1_mask.nii.gz", "sub-1_run-2_mask.nii.gz"),
        ("sub-1_run-1_mask.nii.gz", "sub-1_mask.nii.gz"),
        ("sub-1_mask.nii.gz", "1_mask.nii.gz"),
        ("sub-s1ses2_mask.nii.gz", "sub-s1_ses-2_mask.nii.gz"),
        ("siteA/17/mask.nii.gz", "siteB/17/mask.nii.gz"),
        ("!.nii.gz", "?.nii.gz"),
    ],
)
def test_names_that_only_look_alike_are_refused_with_both_paths(tmp_path: Path, prediction: str, truth: str) -> None:
    touch(tmp_path / "p", prediction)
    touch(tmp_path / "t", truth)
    with pytest.raises(InputRefused, match="no predicted mask matches") as refusal:
        find_pairs(tmp_path / "p", tmp_path / "t")
    assert all(str(tmp_path / path) in refusal.value.found for path in (f"p/{prediction}", f"t/{truth}"))
    touch(tmp_path / "p", "good_mask.nii.gz")
    touch(tmp_path / "t", "good_mask.nii.gz")
    touch(tmp_path / "p", prediction.replace(".nii", "_mask.nii") if "mask" not in prediction else prediction)
    touch(tmp_path / "t", truth.replace(".nii", "_mask.nii") if "mask" not in truth else truth)
    pairs, without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert [pair.case for pair in pairs if pair.predictions] == ["good"]
    (alone,) = [pair for pair in pairs if not pair.predictions]
    with pytest.raises(InputRefused, match="no predicted mask") as refusal:
        score_pair(alone)
    assert str(alone.truth[0]) in str(refusal.value)
    assert "p/" in refusal.value.found
    assert len(without) == 1


@pytest.mark.parametrize(("one", "other"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_one_name_in_two_unicode_forms_is_one(tmp_path: Path, one: str, other: str) -> None:
    for name in ("Müller", "Möller", "김철수"):
        touch(tmp_path / "p", unicodedata.normalize(one, name) + ".nii.gz")
        touch(tmp_path / "t", unicodedata.normalize(other, name) + "_gt.nii.gz")
    pairs, without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert not without
    told = [unicodedata.normalize("NFC", stem(path)) for pair in pairs for path in (*pair.truth, *pair.predictions)]
    assert told == ["Möller_gt", "Möller", "Müller_gt", "Müller", "김철수_gt", "김철수"]


@pytest.mark.parametrize(
    ("predictions", "truths"),
    [
        (("a.mha", "a.nii.gz"), ("a_gt.mha",)),
        (("a.mha",), ("x/a_gt.mha", "y/a_gt.mha")),
        (("x/a.mha", "y/a.mha"), ("a_gt.mha",)),
        (("sub-1_mask.mha",), ("sub-1_desc-lesion1_mask.mha", "sub-1_desc-lesion2_mask.mha")),
        (("sub-1_run-1_mask.mha",), ("sub-1_acq-a_run-1_mask.mha", "sub-1_acq-a_run-01_mask.mha")),
    ],
)
def test_masks_that_can_not_be_told_apart_are_refused_with_all_paths(
    tmp_path: Path, predictions: tuple[str, ...], truths: tuple[str, ...]
) -> None:
    touch(tmp_path / "p", *predictions)
    touch(tmp_path / "t", *truths)
    (pair,), without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert not without
    with pytest.raises(InputRefused, match="more than one") as refusal:
        score_pair(pair)
    assert all(str(tmp_path / "p" / name) in refusal.value.found for name in predictions)
    assert all(str(tmp_path / "t" / name) in refusal.value.found for name in truths)


def test_duplicated_names_go_by_their_folders(tmp_path: Path) -> None:
    names = (
        "siteA/17/mask.mha",
        "siteB/17/mask.mha",
        "siteB/18_mask.mha",
        "18_mask.mha",
        "sub-1/sub-1_mask.mha",
        "x/sub-1/sub-1_mask.mha",
    )
    touch(tmp_path / "p", *names)
    touch(tmp_path / "t", *(name.replace("mask", "seg") for name in names))
    pairs, without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert not without
    told = {str(pair.truth[0].relative_to(tmp_path / "t")): pair.predictions[0] for pair in pairs}
    assert told == {name.replace("mask", "seg"): tmp_path / "p" / name for name in names}


TREES = {
    "odd names": ("1_1/dwi", "11/dwi", "Müller/dwi", "Möller/dwi", "张伟/dwi", "李娜/dwi", "a b/dwi", "a-b/dwi", "A b/dwi"),
    "sites": ("siteA/17/dwi", "siteB/17/dwi", "siteB/18/dwi"),
    "flat": ("17_dwi", "1_7_dwi", "x/18_dwi", "y/18_dwi", "y/19_dwi"),
    "one to a folder": ("c1/17_dwi", "c2/17_dwi"),
    "contract": ("a_1/images/dwi-brain-mri/x", "a1/images/dwi-brain-mri/x", "site/a1/images/dwi-brain-mri/y"),
    "BIDS": ("sub-1/ses-a/dwi/sub-1_ses-a_dwi", "sub-1/ses-b/dwi/sub-1_ses-b_dwi", "sub-2/dwi/sub-2_run-1_dwi"),
    "BIDS at two sites": ("s1/sub-1/sub-1_dwi", "s2/sub-1/sub-1_dwi"),
    "a single case": ("dwi",),
    "long": ("n" * 150 + "1/dwi", "n" * 150 + "2/dwi"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "truths"),
    [(layout, "beside") for layout in TREES] + [(layout, "apart") for layout in TREES if layout != "a single case"],
)
def test_the_tree_of_a_batch_matches_its_data_set(tmp_path: Path, layout: str, truths: str) -> None:
    """Whatever labels it had to make of the names: its reports know them."""
    data, out, true = tmp_path / "data", tmp_path / "out", tmp_path / ("data" if truths == "beside" else "truth")
    truth_of = {}
    for image in TREES[layout]:
        touch(data, f"{image}.nii.gz", re.sub("dwi(?=[^/]*$)|dwi(?=-brain)", "adc", image) + ".nii.gz")
        of_contract = "brain-mri" in image
        truth_of[f"{image}.nii.gz"] = (
            f"{image.split('/images')[0]}/lesion_gt.nii.gz"
            if of_contract
            else re.sub("dwi$", "lesion_gt.nii.gz", image)
        )
        touch(true, truth_of[f"{image}.nii.gz"])
    cases = find_cases(data, out)
    assert [case.problem for case in cases] == [None] * len(TREES[layout])
    expected = {}
    for case in cases:
        place = assign_entities([case.name for case in cases])[case.name]
        mask = out / place.folder / f"{place.prefix}_space-dwi_label-lesion_mask.nii.gz"
        touch(mask.parent, mask.name)
        files = {modality.value: replace_undecodable(str(path)) for modality, path in case.files.items()}
        report = {"case": {"name": replace_undecodable(case.name), "files": files}, "batch": {"key": "x"}}
        (mask.parent / "report.json").write_text(json.dumps(report))
        expected[mask] = true / truth_of[case.files[Modality.DWI].relative_to(data).as_posix()]
    pairs, without = find_pairs(out, true)
    assert not without
    assert {pair.predictions: pair.truth for pair in pairs} == {(mask,): (truth,) for mask, truth in expected.items()}


def test_a_tree_of_results_within_its_data_set_is_no_truth(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-1/sub-1_dwi.nii.gz",
        "sub-1/sub-1_desc-lesion_mask.nii.gz",
        "derivatives/out/sub-1/sub-1_label-lesion_mask.nii.gz",
    )
    (pair,), without = find_pairs(tmp_path / "derivatives" / "out", tmp_path)
    assert (len(pair.truth), len(pair.predictions), without) == (1, 1, [])
    with pytest.raises(InputRefused, match="true masks lies inside"):
        find_pairs(tmp_path, tmp_path / "sub-1")


def test_nothing_to_compare_is_refused_and_nothing_written(masks: tuple[Path, Path], tmp_path: Path) -> None:
    write_image(mask(A), tmp_path / "others" / "q9.nii.gz")
    before = tree(tmp_path)
    for arguments in ((masks[0], tmp_path / "others"), (masks[0], tmp_path / "none"), (tmp_path, masks[1])):
        assert main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out" / "m.csv")]) in (2, 3)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("side", ["p", "t"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_mask_that_fills_the_image_is_none(tmp_path: Path, side: str, inverted: bool) -> None:
    """Ones everywhere, or inside and outside exchanged: it was measured."""
    lesion = np.zeros((6, 6, 6), np.uint8)
    lesion[2:4, 2:4, 2:4] = 1
    grid = replace(GRID, size=(6, 6, 6))
    for name in ("p", "t"):
        odd = 1 - lesion if inverted else np.ones_like(lesion)
        write_image(odd if name == side else lesion, tmp_path / name / "1.nii.gz", grid)
    with pytest.raises(InputRefused, match="can't be a lesion mask"):
        score_pair(find_pairs(tmp_path / "p", tmp_path / "t")[0][0])


def test_equal_labels_of_two_sites_are_two_cases(tmp_path: Path) -> None:
    """Site A's sub-1 was measured against site B's, where one was not segmented and the other not drawn."""
    mask = np.zeros(GRID.shape_zyx, np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    for place in ("p/A/sub-1", "p/B/sub-2", "p/B/sub-3", "t/B/sub-1", "t/A/sub-2", "t/B/sub-3"):
        write_image(mask, tmp_path / f"{place}_space-{place[0]}_mask.nii.gz")
    pairs, without = find_pairs(tmp_path / "p", tmp_path / "t")
    assert [(pair.case, len(pair.predictions)) for pair in pairs] == [("sub-1", 0), ("sub-2", 0), ("sub-3", 1)]
    assert without == ["sub-1", "sub-2"]
    for place in ("q/first/sub-1", "r/second/sub-1"):  # folders that only one tree has say nothing
        write_image(mask, tmp_path / f"{place}_space-{place[0]}_mask.nii.gz")
    ((pair,), _) = find_pairs(tmp_path / "q", tmp_path / "r")
    assert len(pair.predictions) == 1
