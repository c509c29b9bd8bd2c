"""Reader studies: the page in a browser, that nothing in it tells whose masks are shown, and the scoring of answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page
from scipy import stats

from conftest import GRID, PATIENCE_MS, REPOSITORY, phantom_arrays, phantom_case, phantom_lesion, tree, write_image
from ensemble.cli import main
from ensemble.evaluate.blinded import BlindedCase, make_blinded_case, make_reader_study, write_reader_study
from ensemble.prepare.case import prepare_raw
from ensemble.types import Modality
from json_schema import faults

NAMES = ("our-method", "expert-rater")
QUESTIONS = ("preference", "left_completeness", "left_precision", "right_completeness", "right_precision")
HOSTILE = "</script><script>document.title='broken out'</script>"


@pytest.fixture(scope="module")
def cases() -> list[BlindedCase]:
    """Three cases: two masks that differ, equal ones, and two empty ones."""
    images, lesion = prepare_raw(phantom_case(), skull_strip="never"), phantom_lesion()
    masks = [(lesion, np.roll(lesion, 3, axis=2)), (lesion, lesion), (lesion & False, lesion & False)]
    return [make_blinded_case(f"Müller {k} {HOSTILE}", images, pair) for k, pair in enumerate(masks)]


def seed_with_sides(cases: Sequence[BlindedCase], exchanged: bool) -> str:
    """A seed by which the first case is shown one way round."""
    for number in range(99):
        seed = f"{number:064x}"
        entry = next(
            item for item in make_reader_study(cases, NAMES, seed).key["items"] if item["case"] == cases[0].case
        )
        if (entry["left"] == NAMES[1]) == exchanged:
            return seed
    raise AssertionError


def test_the_page_does_not_depend_on_whose_masks_are_shown(cases: list[BlindedCase], tmp_path: Path) -> None:
    """The strongest form of blinding: with masks and names exchanged, and drawn the other way round, the page is the same to the byte."""
    seed = seed_with_sides(cases[:1], exchanged=False)
    study = make_reader_study(cases[:1], NAMES, seed)
    turned = make_reader_study(
        [replace(cases[0], masks=cases[0].masks[::-1])], NAMES[::-1], seed_with_sides(cases[:1], exchanged=True)
    )
    pages = []
    for one in (study, turned):
        assert one.key["items"][0]["left"] == NAMES[0]
        pages.append(one.page.replace(one.key["study"], "study").replace(one.key["items"][0]["item"], "item"))
    assert pages[0] == pages[1]
    assert make_reader_study([replace(cases[0], case="another")], ("x", "y"), seed).page == study.page, (
        "names reach the key only"
    )
    text = study.page
    for secret in (*NAMES, study.key["seed"], study.key["seed"][:12], cases[0].case, "Müller", "true masks"):
        assert secret not in text
    write_reader_study(study, tmp_path / "p.html", tmp_path / "k" / "key.json")
    assert (tmp_path / "k" / "key.json").stat().st_mode & 0o077 == 0


def test_sides_and_order_are_drawn_evenly_and_anew(cases: list[BlindedCase]) -> None:
    many = [replace(cases[2], case=f"{k:02d}") for k in range(24)]
    first, second = make_reader_study(many, NAMES), make_reader_study(many, NAMES)
    assert first.key["seed"] != second.key["seed"]
    orders = [[item["case"] for item in study.key["items"]] for study in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == [case.case for case in many]
    left = [item["left"] for study in (first, second) for item in study.key["items"]].count(NAMES[0])
    assert 8 < left < 40
    assert make_reader_study(many, NAMES, first.key["seed"]).page == first.page, "the key makes the page again"


def keys(page: Page, *pressed: str) -> None:
    for key in pressed:
        page.keyboard.press(key)


def at_case(page: Page, number: int) -> None:
    page.wait_for_selector(f"body[data-shown='{number}']", timeout=PATIENCE_MS)


@pytest.mark.slow
def test_a_reader_answers_by_keyboard_reloads_goes_on_and_is_scored(
    cases: list[BlindedCase], tmp_path: Path, open_page: Callable[[Path], Page]
) -> None:
    study = make_reader_study(cases, NAMES)
    write_reader_study(study, tmp_path / "page.html", tmp_path / "key.json")
    page = open_page(tmp_path / "page.html")
    assert page.title() == "Reader study, 3 cases"
    before = page.locator("#panels canvas").first.screenshot()
    start = page.locator("#where").inner_text()
    keys(page, "ArrowDown")
    assert page.locator("#where").inner_text() != start
    keys(page, "ArrowUp", "m")
    assert page.locator("#panels canvas").first.screenshot() != before
    keys(page, "s")  # without a name nothing is saved, and the cursor stands where it is to be typed
    assert "name" in page.locator("#trouble").inner_text()
    page.keyboard.type("Dr. Ülle Ärzt 1")
    keys(page, "Tab")
    keys(page, "l", "5", "4", "3", "2", "n")
    at_case(page, 2)
    keys(page, "e", "3")
    assert page.locator("#done").inner_text() == "1 of 3"
    page.wait_for_timeout(3000)  # browsers pass on what is stored behind the page's back; people take longer to reload
    page.reload()
    page.wait_for_selector("body[data-ready=yes]", timeout=PATIENCE_MS)
    at_case(page, 2)  # where the first answer is missing
    assert page.locator("#reader").input_value() == "Dr. Ülle Ärzt 1"
    assert page.locator("[data-question=preference] [aria-checked=true]").inner_text() == "equal (E)"
    keys(page, "3", "3", "3", "u")
    at_case(page, 3)
    page.locator("[data-question=preference] button").nth(2).focus()
    keys(page, "Enter")  # by Tab and Enter, as any page
    keys(page, "1", "1", "5", "5")
    assert page.locator("#done").inner_text() == "3 of 3"
    with page.expect_download(timeout=PATIENCE_MS) as download:
        keys(page, "s")
    download.value.save_as(tmp_path / "answers.csv")
    assert download.value.suggested_filename == "answers_Dr-lle-rzt-1.csv"
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [[row[name] for name in QUESTIONS] for row in rows] == [
        ["left", "5", "4", "3", "2"],
        ["equal", "3", "3", "3", "3"],
        ["right", "1", "1", "5", "5"],
    ]
    out = tmp_path / "scores.csv"
    arguments = [
        "--reader-answers",
        str(tmp_path / "answers.csv"),
        "--key",
        str(tmp_path / "key.json"),
        "--out",
        str(out),
    ]
    assert main(["evaluate", *arguments]) == 0
    data = json.loads((tmp_path / "scores_readers.json").read_text())
    better = [study.key["items"][0]["left"], study.key["items"][2]["right"]]
    (row,) = data["preferences"]
    assert (row["first_better"], row["equal"], row["second_better"]) == (
        better.count(NAMES[0]),
        1,
        better.count(NAMES[1]),
    )
    assert list(faults(data, json.loads((REPOSITORY / "docs" / "readers.schema.json").read_text()))) == []
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#clear").click()
    assert (page.locator("#reader").input_value(), page.locator("#done").inner_text()) == ("", "0 of 3")
    scored = open_page(tmp_path / "scores_readers.html")
    assert "Dr. Ülle Ärzt 1" in scored.locator("#preferences").inner_text()


@pytest.mark.slow
def test_the_page_of_a_study_opens_without_complaint(tmp_path: Path, open_page: Callable[[Path], Page]) -> None:
    lesion = phantom_lesion().astype(np.uint8)
    for case in "xyz":
        for name, shift in (("a", 1), ("b", 2), ("truth", 0)):
            write_image(np.roll(lesion, shift, axis=1), tmp_path / name / f"<b>{case}.nii.gz")
    paths = [str(tmp_path / name) for name in ("a", "b", "truth")]
    assert main(["evaluate", *paths, "--out", str(tmp_path / "m.csv"), "--by", "lesion_size"]) == 0
    page = open_page(tmp_path / "m_study.html")
    assert page.locator("#ranking tbody tr").count() == 2
    page.locator("#cases summary").click()
    assert "<b>x" in page.locator("#cases").inner_text()
    shown = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("img.plot").count() == 3
    assert page.locator("img.plot").evaluate_all(shown)


# Scoring.


@pytest.fixture
def key(tmp_path: Path) -> dict[str, Any]:
    """A key of 12 cases of which the odd ones are shown the other way round."""
    sides = [NAMES if k % 2 == 0 else NAMES[::-1] for k in range(12)]
    items = [{"item": letters(k), "case": f"{k}", "left": one, "right": other} for k, (one, other) in enumerate(sides)]
    content = {
        "schema": 1,
        "tool": {"name": "isles-ensemble", "version": "0"},
        "study": "abc",
        "seed": "0",
        "methods": list(NAMES),
    }
    (tmp_path / "key.json").write_text(json.dumps(content | {"items": items}))
    return content | {"items": items}


def letters(number: int) -> str:
    return "abcdefghijkl"[number] * 12


def answers(path: Path, reader: str, better: Sequence[str], grades: Sequence[tuple[int, int]] = ()) -> Path:
    """Write what the page would, for answers by method: the better one, and grades of both (completeness and precision alike)."""
    lines = [",".join(("study", "reader", "item", *QUESTIONS))]
    for k, said in enumerate(better):
        sides = NAMES if k % 2 == 0 else NAMES[::-1]
        choice = said if said in ("", "equal") else ("left", "right")[sides.index(said)]
        given = dict(zip(NAMES, grades[k], strict=True)) if grades else {}
        cells = [str(given.get(side, "")) for side in sides for _ in range(2)]
        lines.append(",".join(f'"{cell}"' for cell in ("abc", reader, letters(k), choice, *cells)))
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    return path


def scored(tmp_path: Path, *files: Path) -> dict[str, Any]:
    out = tmp_path / "out" / "s.csv"
    assert (
        main(["evaluate", "--reader-answers", *map(str, files), "--key", str(tmp_path / "key.json"), "--out", str(out)])
        == 0
    )
    names = ("s.csv", "s_grades.csv", "s_grade_differences.csv", "s_readers.json", "s_readers.html")
    assert set(tree(out.parent)) == set(names)
    data: dict[str, Any] = json.loads((out.parent / "s_readers.json").read_text())
    assert list(faults(data, json.loads((REPOSITORY / "docs" / "readers.schema.json").read_text()))) == []
    return data


def test_answers_are_unblinded_and_scored(key: dict[str, Any], tmp_path: Path) -> None:
    a, b = NAMES
    first = [a] * 8 + [b] * 2 + ["equal"] * 2
    second = [a] * 6 + ["equal"] * 3 + [b] * 2 + [""]
    third = [a] * 5 + [b] * 7
    grades = [(5, 4)] * 6 + [(3, 4)] * 2 + [(5, 3)] * 4
    files = [
        answers(tmp_path / f"{k}.csv", f"reader {k}", said, grades) for k, said in enumerate((first, second, third))
    ]
    data = scored(tmp_path, *files)
    rows = {row["reader"]: row for row in data["preferences"]}
    assert [(rows[f"reader {k}"][n] for n in ("first_better", "equal", "second_better")) for k in range(3)]
    assert (rows["reader 0"]["first_better"], rows["reader 0"]["equal"], rows["reader 0"]["second_better"]) == (8, 2, 2)
    interval = stats.beta.ppf([0.025, 0.975], [8, 9], [3, 2])  # Clopper and Pearson by the beta distribution
    assert [rows["reader 0"][name] for name in ("ci_low", "ci_high")] == pytest.approx(interval.tolist())
    assert rows["reader 0"]["p"] == pytest.approx(2 * sum(stats.binom.pmf(range(8, 11), 10, 0.5)))
    most = rows["majority of the readers"]
    # 0-5 by two or three; 6, 7: a, equal, b; 8: b, equal, b; 9, 10: b; 11: equal and b
    assert (most["first_better"], most["equal"], most["second_better"]) == (6, 2, 4)
    assert rows["all answers"]["ci_low"] is None
    assert rows["all answers"]["first_better"] == 19
    assert data["notes"] == ["reader 1 answered all questions for 11 of 12 cases"]
    counts = [
        [said.count(one) for one in (a, "equal", b)]
        for said in zip(first, second, third, strict=True)
        if "" not in said
    ]
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is not installed")
    assert data["fleiss_kappa"] == pytest.approx(inter_rater.fleiss_kappa(np.array(counts)))
    assert data["fleiss_kappa_cases"] == 11
    (completeness, _) = data["grade_differences"]
    differences = np.array([one - other for one, other in grades], float)
    assert (completeness["n"], completeness["mean_difference"]) == (12, pytest.approx(differences.mean()))
    theirs = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (completeness["mean_ci_low"], completeness["mean_ci_high"]) == pytest.approx(tuple(theirs))
    everybody = {(row["grade"], row["method"]): row for row in data["grades"] if row["reader"] == "all answers"}
    assert everybody["precision", b]["mean"] == pytest.approx(np.mean([other for _, other in grades]))
    assert everybody["precision", b]["n"] == 36


def test_one_reader_and_undecided_ones_are_told_why_there_is_no_more(key: dict[str, Any], tmp_path: Path) -> None:
    data = scored(tmp_path, answers(tmp_path / "a.csv", "=cmd", ["equal"] * 12))
    (row,) = data["preferences"]
    assert (row["share"], row["ci_low"], row["note"]) == (None, None, "no answer prefers one of the methods")
    assert (data["fleiss_kappa"], data["fleiss_kappa_note"]) == (None, "there is one reader")
    assert data["grades"] == data["grade_differences"] == []
    assert "'=cmd" in (tmp_path / "out" / "s.csv").read_text()
    both = scored(tmp_path, *(answers(tmp_path / f"{name}.csv", f"<b>{name}", ["equal"] * 12) for name in "xy"))
    assert (both["fleiss_kappa"], both["fleiss_kappa_note"]) == (None, "all answers are the same")
    assert "<b>x" not in (tmp_path / "out" / "s_readers.html").read_text()


def test_answers_that_spreadsheets_have_saved_are_read(key: dict[str, Any], tmp_path: Path) -> None:
    path = answers(tmp_path / "a.csv", "Ä", [NAMES[0]] * 12, [(5, 1)] * 12)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace('"', "").replace(",", ";").encode())
    assert scored(tmp_path, path)["preferences"][0]["first_better"] == 12


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"abc"', '"other"', "a different study"),
        (letters(1), "zz", "not in the key"),
        (letters(1), letters(0), "repeats an answer"),
        ('"R"', '""', "has no reader"),
        ('"left"', '"Left side"', "an invalid preference"),
        ('"5"', '"6"', "an invalid grade"),
        ('"5"', '"4.5"', "an invalid grade"),
        ("preference", "choice", "lacks columns"),
    ],
)
def test_answers_that_the_page_never_writes_are_refused(
    key: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    path = answers(tmp_path / "a.csv", "R", [NAMES[0]] * 12, [(5, 1)] * 12)
    path.write_text(path.read_text().replace(old, new, 1))
    before = tree(tmp_path)
    arguments = ["--key", str(tmp_path / "key.json"), "--out", str(tmp_path / "out" / "s.csv")]
    assert main(["evaluate", "--reader-answers", str(path), *arguments]) == 3
    assert said in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_other_misuse_is_refused(key: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, again = (
        answers(tmp_path / f"{name}.csv", reader, [NAMES[0]] * 12) for name, reader in (("a", "Ann"), ("b", "ann"))
    )
    out = ["--out", str(tmp_path / "s.csv")]
    with_key = ["--key", str(tmp_path / "key.json"), *out]
    for arguments, code, said in (
        (
            ["--reader-answers", str(one), str(again), *with_key],
            3,
            "two answer files of the reader study have the same reader",
        ),
        (["--reader-answers", str(one), *out], 2, "needs --key"),
        (["--reader-answers", str(one), "--key", str(one), *out], 3, "is not the key of"),
        (["--reader-answers", str(tmp_path / "none.csv"), *with_key], 3, "does not exist"),
        (["--reader-answers", str(one), *with_key, "--by", "x"], 2, "can only be combined"),
        ([str(tmp_path), str(tmp_path), "--reader-study", str(tmp_path / "p.html"), *out], 2, "needs the images"),
        ([str(tmp_path), str(tmp_path), "--images", str(tmp_path), *out], 2, "have no effect without"),
    ):
        assert main(["evaluate", *arguments]) == code
        assert said in capsys.readouterr().err
    assert set(tree(tmp_path)) == {"a.csv", "b.csv", "key.json"}


def test_the_command_makes_page_and_key_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, lesion = phantom_arrays(), phantom_lesion().astype(np.uint8)
    for case in ("p1", "p2", "p3"):
        for name in ("truth", "a"):
            write_image(lesion, tmp_path / name / f"{case}_mask.nii.gz")
        if case != "p3":
            write_image(arrays[Modality.DWI], tmp_path / "data" / case / "dwi.nii.gz")
            write_image(arrays[Modality.ADC], tmp_path / "data" / case / "adc.nii.gz")
    odd = replace(GRID, origin_mm=(0.0, 0.0, 0.0))
    for name in ("truth", "a"):
        write_image(lesion, tmp_path / name / "p2_mask.nii.gz", odd)
    paths = [str(tmp_path / name) for name in ("a", "truth")]
    page = tmp_path / "readers" / "page.html"
    asked = ["--reader-study", str(page), "--images", str(tmp_path / "data"), "--out", str(tmp_path / "out" / "m.csv")]
    assert main(["evaluate", *paths, *asked]) == 0
    key = json.loads((tmp_path / "readers" / "page_key.json").read_text())
    assert [item["case"] for item in key["items"]] == ["p1"]
    assert key["methods"] == ["a", "true masks"]
    said = capsys.readouterr().out
    assert "p2 is not in the reader study: a mask has a different grid" in said
    assert f"mask {odd.describe()}; DWI" in said
    assert "p3 is not in the reader study: case p3 has no images" in said
    assert "cases with images: p1, p2" in said
    before = tree(tmp_path)
    assert main(["evaluate", *paths, *asked]) == 2, "a key is never replaced"
    assert "a reader study already exists" in capsys.readouterr().err
    assert tree(tmp_path) == before
