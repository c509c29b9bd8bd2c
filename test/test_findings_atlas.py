"""Label maps of the user's: read and refused as a folder of BIDS names, asked in the template's space; and the options of findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import template_heads as heads
from batch_runs import rows, run_batch
from conftest import REPOSITORY, StubMember, shared, write_contract_case, write_image
from ensemble import cli
from ensemble.batch.identity import describe_recipe
from ensemble.cli import main
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import UsageError
from ensemble.findings import find as finding
from ensemble.findings.find import compute_findings, register_case_to_template
from ensemble.findings.locations import LesionVoxels
from ensemble.findings.maps import ASPECTS_SHARE, LabelMap, read_label_map, read_label_maps
from ensemble.findings.registration import TemplateTransform
from ensemble.findings.template import SPACE, shipped_template
from ensemble.findings.types import Findings
from ensemble.geometry import Grid
from ensemble.options import parse_options
from ensemble.pipeline import Ensemble
from ensemble.types import AnyArray
from json_schema import faults

#: Of the maps: MNI, 4 mm.
MAP_GRID = Grid((49, 58, 47), (4.0, 4.0, 4.0), (-98.0, -98.0, -72.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
TABLE = "index\tname\tgroup\tside\n1\tfront L\tACA\tleft\n2\tfront R\tACA\tright\n3\trear L\tPCA\tleft\n4\trear R\tPCA\tright\n"
EXACT = TemplateTransform(heads.true_matrix(), 0.95, 0.95, (1.1, 1.1, 1.1), 9.0, 0.5)


def quarters() -> AnyArray:
    """1 and 2 left and right in front, 3 and 4 in the rear (z, y, x), in the template's brain."""
    index = np.moveaxis(np.indices(MAP_GRID.shape_zyx), 0, -1)[..., ::-1]
    points = index @ MAP_GRID.affine[:3, :3].T + MAP_GRID.affine[:3, 3]
    number = 1 + (points[..., 0] < 0) + 2 * (points[..., 1] > 20)
    hull = shipped_template().hull[::2, ::2, ::2][
        : MAP_GRID.shape_zyx[0], : MAP_GRID.shape_zyx[1], : MAP_GRID.shape_zyx[2]
    ]
    padded = np.zeros(MAP_GRID.shape_zyx, bool)
    padded[: hull.shape[0], : hull.shape[1], : hull.shape[2]] = hull
    return np.where(padded, number, 0).astype(np.uint8)


def write_map(
    folder: Path, name: str = "territories", table: str = TABLE, array: AnyArray | None = None, grid: Grid = MAP_GRID
) -> Path:
    path = write_image(quarters() if array is None else array, folder / f"{name}_dseg.nii.gz", grid)
    (folder / f"{name}_dseg.tsv").write_text(table, encoding="utf-8")
    return path


def asked(folder: Path, mask: AnyArray) -> Findings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "register_case_to_template", lambda case, onto: EXACT)
        return compute_findings(heads.result(mask), read_label_maps(folder))


def test_territories_lead_on_their_side_with_shares_and_ranges(tmp_path: Path) -> None:
    write_map(tmp_path)
    told = asked(tmp_path, heads.ball((40, 30, 10), radius_mm=9.0) | heads.ball((-30, -60, 20), radius_mm=5.0))
    (atlas,) = told.atlases
    assert atlas.leading is not None
    assert atlas.leading_side is not None
    assert (atlas.leading.value, atlas.leading_side.value) == ("ACA", "right")
    shares = {amount.name: amount.share for amount in (*atlas.groups, *atlas.sided_groups)}
    assert set(shares) == {"ACA", "PCA", "ACA right", "PCA left"}
    assert shares["ACA"].value + shares["PCA"].value == pytest.approx(1.0)
    assert shares["ACA right"].value == shares["ACA"].value > 0.75
    for share in shares.values():
        assert share.placement is not None
        assert share.placement[0] <= share.value <= share.placement[1]


def test_shares_are_those_of_the_known_place(tmp_path: Path) -> None:
    """A lesion across a border: its share on either side is known from where it truly lies."""
    write_map(tmp_path)
    mask = heads.ball((30, -18, 20), radius_mm=12.0)
    sample = LesionVoxels.of(mask, heads.GRID)
    truth = ((sample.points_mm @ EXACT.matrix[:3, :3].T + EXACT.matrix[:3, 3])[:, 1] <= 20).mean()
    (atlas,) = asked(tmp_path, mask).atlases
    assert {a.name: a.share.value for a in atlas.groups}["ACA"] == pytest.approx(truth, abs=0.05)


def ten_regions(side_column: bool) -> tuple[AnyArray, str]:
    """Slabs of the brain from front to rear, ten a side, numbered 1 to 10 left and 11 to 20 right."""
    halves = quarters()
    y = np.indices(halves.shape)[1]
    inside = np.flatnonzero((halves > 0).any(axis=(0, 2)))
    slab = np.clip((y - inside[0]) * 10 // (len(inside)), 0, 9)
    array = np.where(halves > 0, 1 + slab + 10 * (halves % 2 == 0), 0).astype(np.uint8)
    rows = [
        f"{n + 10 * k}\tM{n}{'' if side_column else '_' + 'LR'[k]}\t{('left', 'right')[k]}"
        for k in (0, 1)
        for n in range(1, 11)
    ]
    header = "index\tname\tside" if side_column else "index\tname"
    return array, "\n".join([header, *(row if side_column else row.rpartition("\t")[0] for row in rows)]) + "\n"


@pytest.mark.parametrize("side_column", [True, False])
def test_aspects_takes_off_a_point_a_region_and_is_marked(tmp_path: Path, side_column: bool) -> None:
    array, table = ten_regions(side_column)
    write_map(tmp_path, "aspects", table, array)
    everything_right = heads.case().brain.array & (on_side(right=True))
    (atlas,) = asked(tmp_path, everything_right).atlases
    assert atlas.aspects is not None
    assert "research" in atlas.as_json()["aspects"]["notice"]
    assert atlas.as_json()["aspects"]["share_above"] == ASPECTS_SHARE
    scores = {score.side: score.score.value for score in atlas.aspects.scores}
    assert scores == {"left": 10, "right": 0}
    (none,) = asked(tmp_path, heads.ball((30, -18, 20), radius_mm=4.0)).atlases
    assert none.aspects is not None
    assert {score.score.value for score in none.aspects.scores} == {10}


def on_side(right: bool) -> AnyArray:
    """Voxels of the head on one side of the template's midline."""
    index = np.moveaxis(np.indices(heads.GRID.shape_zyx), 0, -1)[..., ::-1]
    points = index @ heads.GRID.affine[:3, :3].T + heads.GRID.affine[:3, 3]
    x = (points @ EXACT.matrix[:3, :3].T + EXACT.matrix[:3, 3])[..., 0]
    return np.asarray((x < 0) == right)


def test_a_map_of_nine_regions_gets_no_score(tmp_path: Path) -> None:
    array, table = ten_regions(side_column=True)
    array = np.where(array == 20, 0, array)
    write_map(tmp_path, "aspects", table, array)
    (atlas,) = asked(tmp_path, heads.ball((30, -18, 20))).atlases
    assert atlas.aspects is not None
    assert [score.side for score in atlas.aspects.scores] == ["left"]


@pytest.mark.parametrize(
    ("name", "sidecar", "said", "mismatch"),
    [
        (f"tpl-{SPACE}_territories", None, f"{SPACE} (file name)", ""),
        ("space-MNI152NLin6Asym_territories", None, "MNI152NLin6Asym (file name)", "its space is MNI152NLin6Asym"),
        ("territories", {"SpatialReference": SPACE}, f"{SPACE} (sidecar)", ""),
        ("territories", {"SpatialReference": "Talairach"}, "Talairach (sidecar)", "its space is Talairach"),
        ("territories", {"Description": "no word"}, "not stated", "not stated"),
    ],
)
def test_the_space_of_a_map_is_read_and_a_mismatch_said(
    tmp_path: Path, name: str, sidecar: object, said: str, mismatch: str
) -> None:
    path = write_map(tmp_path, name)
    if sidecar is not None:
        (tmp_path / f"{name}_dseg.json").write_text(json.dumps(sidecar))
    one = read_label_map(path)
    if said == "not stated":  # what the header's form code says, if anything
        assert one.space in ("not stated", "MNI152, by its form code (header)", "Talairach, by its form code (header)")
        return
    assert one.space == said
    assert mismatch in one.mismatch
    assert bool(one.mismatch) == bool(mismatch)


def test_fsl_s_grid_is_known_by_its_size(tmp_path: Path) -> None:
    grid = Grid((91, 109, 91), (2.0, 2.0, 2.0), (-90.0, -90.0, -72.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    array = np.zeros(grid.shape_zyx, np.uint8)
    array[30:50, 40:60, 55:70] = 1
    one = read_label_map(write_map(tmp_path, "a", "index\tname\n1\tx\n", array, grid))
    assert "FSL" in one.space
    assert SPACE in one.mismatch
    assert one.labels[0].side == "left", "a label without side has that on which it lies"


ODD = {
    "a table without names": ("index\tlabel\n1\tx\n", None, "no column 'name'"),
    "commas": ("index,name\n1,x\n", None, "no column 'index'"),
    "more than a table of labels takes": ("index\tname\n" + "1\tx\n" * 2**20, None, "more than"),
    "a word for an index": ("index\tname\none\tx\n", None, "line 2"),
    "an index twice": ("index\tname\n1\tx\n1\ty\n", None, "line 3"),
    "a side that is none": (TABLE.replace("\tleft", "\tup"), None, "'up'"),
    "a label without a row": (TABLE.replace("4\trear R\tPCA\tright\n", ""), None, "4"),
    "sides swapped": (
        TABLE.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right"),
        None,
        "lies left",
    ),
    "fractions": (TABLE, lambda: quarters().astype(np.float32) + 0.5, ""),
    "nothing in it": (TABLE, lambda: np.zeros(MAP_GRID.shape_zyx, np.uint8), ""),
}


@pytest.mark.parametrize("what", ODD)
def test_a_map_that_can_t_be_used_is_refused(tmp_path: Path, what: str) -> None:
    table, array, found = ODD[what]
    path = write_map(tmp_path, table=table, array=array() if callable(array) else None)
    with pytest.raises(UsageError) as refused:
        read_label_map(path)
    assert found in str(refused.value)


def test_a_map_beside_the_brain_is_not_in_mni(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not in MNI space"):
        read_label_map(write_map(tmp_path, grid=replace(MAP_GRID, origin_mm=(300.0, 0.0, 0.0))))


def test_folders_without_maps_and_maps_without_tables_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match="--atlas"):
            read_label_maps(folder)
    write_map(tmp_path / "one").with_name("territories_dseg.tsv").unlink()
    with pytest.raises(UsageError, match=r"table of an atlas does not exist"):
        read_label_maps(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "x_dseg.nii.gz").write_bytes(b"no image")
    with pytest.raises(UsageError):
        read_label_maps(tmp_path / "two")


def test_a_batch_is_done_anew_when_a_map_changes(tmp_path: Path) -> None:
    recipes = []
    for name, table in (("a", TABLE), ("b", TABLE), ("c", TABLE)):
        write_map(tmp_path / name, table=table, array=quarters() if name != "c" else quarters()[::-1].copy())
        recipes.append(describe_recipe((), {}, RunConfig(), ExtraOutputs(findings=True, atlas=tmp_path / name)))
    assert recipes[0] == recipes[1] != recipes[2]


@pytest.fixture
def published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub_ensemble: Callable[..., Ensemble]
) -> Callable[..., set[str]]:
    """Runs the contract with options on a stub; returns the names of what it wrote."""
    monkeypatch.delenv("ISLES_FINDINGS")
    monkeypatch.setattr("ensemble.pipeline.load_from_config", lambda config: stub_ensemble(StubMember("a")))
    monkeypatch.setattr(finding, "register_case_to_template", lambda case, onto: None)
    write_contract_case(tmp_path / "in")

    def run(*options: str) -> set[str]:
        out = tmp_path / "out" / "_".join(options).replace("/", "")[:40]
        assert main([f"--input={tmp_path / 'in'}", f"--output={out}", *options]) == 0
        report = out / "report.json"
        told = json.loads(report.read_text())["findings"] is not None if report.is_file() else False
        return {path.name for path in out.iterdir()} | ({"findings"} if told else set())

    return run


def test_findings_are_on_where_there_is_a_report_and_bring_one_when_asked_for(
    published: Callable[..., set[str]],
) -> None:
    assert published() == {"images", "results.json"}
    assert published("--findings=off") == {"images", "results.json"}
    assert "findings" in published("--report")
    assert "findings" not in published("--report", "--findings=off")
    assert {"findings", "report.json", "report.html"} <= published("--findings=on")


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path)
    for option in ("--save-mni", f"--atlas={tmp_path}"):
        with pytest.raises(UsageError, match="needs the findings"):
            cli._extras(parse_options(["--findings=off", option], {}), report=True)
    assert cli._extras(parse_options([f"--atlas={tmp_path}"], {}), report=False).report
    batch = cli._extras(parse_options(["batch", "a", "b"], {}), report=False, in_report=True)
    assert (batch.findings, batch.report) == (True, False)


def test_an_atlas_that_can_t_be_used_is_said_before_anything_is_done(tmp_path: Path) -> None:
    assert main(["run", "--dwi", "nowhere", "--out", str(tmp_path / "out"), f"--atlas={tmp_path}"]) == 2
    assert not (tmp_path / "out").exists()


def test_known_territories_of_the_shared_atlas(tmp_path: Path) -> None:
    """The arterial atlas as users have it: shares of lesions across borders, as registered, are those of the head's true place."""
    one = shared_territories(tmp_path)
    registered = register_case_to_template(heads.case())
    assert registered is not None
    for at, leading in (
        ((45, -20, 20), "MCA"),
        ((-20, 30, 35), "ACA"),
        ((30, -60, 10), "PCA"),
        ((-25, -60, -35), "VB"),
    ):
        shares = []
        for placement in (EXACT, registered):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finding, "register_case_to_template", lambda case, onto, known=placement: known)
                (atlas,) = compute_findings(heads.result(heads.ball(at, radius_mm=18.0)), (one,)).atlases
            shares.append({amount.name: amount.share.value for amount in (*atlas.groups, *atlas.sided_groups)})
            assert atlas.leading is not None
            assert atlas.leading_side is not None
            assert atlas.leading_side.value == ("right" if at[0] > 0 else "left")
        assert max(shares[0], key=lambda name: shares[0][name]) == leading
        for name in shares[0].keys() | shares[1].keys():
            assert shares[1].get(name, 0) == pytest.approx(shares[0].get(name, 0), abs=0.05)
    assert "FSL" in atlas.space


def shared_territories(folder: Path) -> LabelMap:
    """The arterial atlas of the development material, with a table made of its own."""
    from benchmarks.findings import territories

    return territories(shared("atlases/ArterialAtlas_MNI182.nii.gz").parent, folder)


def test_a_batch_tells_findings_in_every_report_and_in_its_summary(tmp_path: Path, weights: Path) -> None:
    write_map(tmp_path / "maps")
    case = tmp_path / "data" / "case"
    for modality, image in heads.raw().images.items():
        array = image.volume.array.copy()
        array[heads.ball((40, 30, 10), radius_mm=9.0)] *= 2.5 if modality == "dwi" else 0.5
        write_image(array, case / f"{modality}.nii.gz", heads.GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "register_case_to_template", lambda case, onto: EXACT)
        extras = ExtraOutputs(findings=True, atlas=tmp_path / "maps")
        assert run_batch(tmp_path / "data", tmp_path / "out", weights, extras=extras) == 0
    (row,) = rows(tmp_path / "out").values()
    schema = json.loads((REPOSITORY / "docs" / "summary.schema.json").read_text(encoding="utf-8"))
    assert list(faults(row, schema)) == []
    assert (row["findings"], row["side"], row["leading"]) == ("ok", "right", "territories=ACA")
    report = json.loads(next((tmp_path / "out").glob("sub-*/report.json")).read_text())
    schema = json.loads((REPOSITORY / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    assert list(faults(report, schema)) == []
    assert report["batch"]["recipe"]["options"]["atlas"] == {
        "territories": read_label_maps(tmp_path / "maps")[0].sha256
    }
    assert report["findings"]["volume_ml"]["members"][0] <= report["findings"]["volume_ml"]["value"]
