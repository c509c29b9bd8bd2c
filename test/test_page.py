"""The pages, opened in a browser: slices, outlines, tables, no error, and nothing fetched from anywhere.

They need Debian's (or any) Chromium: apt-get install chromium. CHROMIUM names another one. Without, these tests are skipped, and say so.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page
from scipy.ndimage import gaussian_filter

from conftest import StubMember, phantom_case
from ensemble.geometry import Grid
from ensemble.outputs.report.page import MAX_LOSSLESS_VOXELS, lesion_table, render_case_page, render_index_page
from ensemble.outputs.report.run_report import build_report
from ensemble.pipeline import Ensemble, Result, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import Modality
from ensemble.volume import Volume

Build = Callable[..., Ensemble]
HOSTILE = "</script><script>document.title='broken out'</script><b>&amp; \" '"


@pytest.fixture
def result(stub_ensemble: Build) -> tuple[Result, Ensemble]:
    members = (StubMember("a", level=1.3), StubMember("b", level=1.9), StubMember(HOSTILE, level=1.5))
    ensemble = stub_ensemble(*members, StubMember("broken", error=RuntimeError(HOSTILE)), min_members=1)
    return segment_raw(replace(phantom_case(flair=True), name=HOSTILE), ensemble, SilentWatcher()), ensemble


def written(result: Result, ensemble: Ensemble, path: Path) -> Path:
    path.write_text(
        render_case_page(build_report(phantom_case(flair=True), result, ensemble), result), encoding="utf-8"
    )
    return path


def picture(page: Page, panel: int = 0) -> bytes:
    return page.locator("#panels canvas").nth(panel).screenshot()


def red(page: Page, panel: int = 0) -> dict[str, float]:
    """Pixels of the mask's outline on a panel: how many, and their middle as fractions of the width and height."""
    pixels = np.asarray(Image.open(io.BytesIO(picture(page, panel))).convert("RGB")).astype(int)
    outline = (pixels[..., 0] > 200) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    if not outline.any():
        return {"n": 0}
    y, x = np.nonzero(outline)
    return {"n": len(x), "x": x.mean() / outline.shape[1], "y": y.mean() / outline.shape[0]}


def move_slider(page: Page, to: int) -> None:
    page.locator("#slice").fill(str(to))


def test_the_slider_moves_the_slice_and_the_mask_is_outlined(
    tmp_path: Path, open_page: Callable[[Path], Page], result: tuple[Result, Ensemble]
) -> None:
    page = open_page(written(*result, tmp_path / "case.html"))
    assert page.title().startswith(HOSTILE), "a name is only a name"
    assert page.locator("#panels figcaption").all_inner_texts() == ["DWI", "ADC", "FLAIR"]
    area = result[0].fused.mask.array.sum(axis=(1, 2))
    assert page.locator("#where").inner_text() == f"{int(area.argmax()) + 1} of {len(area)}"
    outline = red(page)
    assert outline["n"] > 60
    # the lesion lies to the patient's left and front: right of and above the middle, as radiologists look
    assert outline["x"] > 0.55
    assert outline["y"] < 0.5
    before = [picture(page, panel) for panel in range(3)]
    move_slider(page, 3)
    assert page.locator("#where").inner_text() == f"3 of {len(area)}"
    assert all(picture(page, panel) != before[panel] for panel in range(3))
    assert area[2] == 0
    assert red(page)["n"] == 0
    page.locator("tr.jump").first.click()
    assert [picture(page, panel) for panel in range(3)] == before
    page.keyboard.press("ArrowUp")
    assert page.locator("#where").inner_text() == f"{int(area.argmax()) + 2} of {len(area)}"
    page.locator("#panels canvas").first.hover()
    page.mouse.wheel(0, 100)
    page.wait_for_function(
        f"document.getElementById('where').textContent === '{int(area.argmax()) + 1} of {len(area)}'"
    )


def test_zoom_move_modes_and_brightness_change_what_is_seen(
    tmp_path: Path, open_page: Callable[[Path], Page], result: tuple[Result, Ensemble]
) -> None:
    page = open_page(written(*result, tmp_path / "case.html"))
    whole = picture(page)
    page.locator("#in").click()
    assert page.locator("#zoom").inner_text() == "1.5x"
    zoomed = picture(page)
    box = page.locator("#panels canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 150, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 170)
    page.mouse.up()
    moved = picture(page)
    page.locator("#whole").click()
    page.mouse.move(0, 0)
    seen = {whole, zoomed, moved}
    for mode, entries in (("agreement", 4), ("members", 3), ("none", 0)):
        page.locator("#mode").select_option(mode)
        assert page.locator("#legend span").count() == entries
        seen.add(picture(page))
    page.locator("#brightness").fill("2")
    seen.add(picture(page))
    assert len(seen) == 7
    page.locator("#brightness").fill("1")
    page.locator("#mode").select_option("mask")
    assert picture(page) == whole


def test_the_tables_say_what_the_report_says(
    tmp_path: Path, open_page: Callable[[Path], Page], result: tuple[Result, Ensemble]
) -> None:
    made = replace(result[0], case=replace(result[0].case, repairs=("the ADC header was off", HOSTILE)))
    page = open_page(written(made, result[1], tmp_path / "case.html"))
    row = page.locator("#lesions tbody tr").first.inner_text().split("\t")
    lesion = lesion_table(made)[0]
    assert row[:3] == ["1", f"{lesion['volume_ml']:.3f}", lesion["centre"]]
    assert row[3] == f"{lesion['first']}\N{EN DASH}{lesion['last']}"
    assert page.locator("#repairs li").all_inner_texts() == ["the ADC header was off", HOSTILE]
    members = page.locator("#members tbody tr").all_inner_texts()
    assert [line.split("\t")[1] for line in members[:3]] == ["voted"] * 3
    assert "RuntimeError" in members[3]
    assert "Not a medical device" in page.locator(".notice").first.inner_text()
    page.locator("#versions summary").click()
    assert "torch" in page.locator("#versions").inner_text()


def test_a_page_without_lesion_or_flair(
    tmp_path: Path, open_page: Callable[[Path], Page], stub_ensemble: Build
) -> None:
    ensemble = stub_ensemble(StubMember("a", level=9.0))
    healthy = segment_raw(phantom_case(), ensemble, SilentWatcher())
    page = open_page(written(healthy, ensemble, tmp_path / "case.html"))
    assert "No lesion was found" in page.locator("#lesions").inner_text()
    assert page.locator("#panels canvas").count() == 2
    assert red(page)["n"] == 0


def test_lesions_have_their_volume_place_and_slices(stub_ensemble: Build) -> None:
    """Two boxes at known places, on a grid whose axes run the other way."""
    grid = Grid((20, 24, 16), (3.0, 2.0, 5.0), (30.0, 40.0, -20.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    result = segment_raw(phantom_case(), stub_ensemble(StubMember("a")), SilentWatcher())
    mask = np.zeros(grid.shape_zyx, bool)
    mask[2:4, 10:13, 5:9] = True
    mask[10, 3, 2] = True
    on = {name: Volume(array, grid) for name, array in (("mask", mask), ("votes", mask.astype(np.uint8)))}
    made = replace(
        result,
        case=replace(result.case, images={Modality.DWI: on["votes"]}),
        fused=replace(result.fused, **on),
    )
    first, second = lesion_table(made)
    assert first["volume_ml"] == pytest.approx(24 * 0.03)
    assert first["centre_lps_mm"] == [30 - 3 * 6.5, 40 - 2 * 11, -20 + 5 * 2.5]
    assert first["centre"] == "L 10, P 18, I 8"
    assert (first["first"], first["last"]) == (3, 4)
    assert second["centre_lps_mm"] == [24.0, 34.0, 30.0]
    assert (second["first"], second["last"], second["unanimous"]) == (11, 11, 1.0)


def large_case(shape: tuple[int, int, int]) -> RawCase:
    """Noise in an ellipsoid that fills the grid: the hardest to compress that can come."""
    x, y, z = (mm / points for mm, points in zip((140.0, 170.0, 120.0), shape[::-1], strict=True))  # 1.5 l, as a brain
    grid = Grid(shape[::-1], (x, y, z), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))  # type: ignore[arg-type]
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    head, rng = x**2 + y**2 + z**2 < 1, np.random.default_rng(0)
    images, shared = {}, rng.normal(0, 0.07, shape)  # by which an ADC belongs to its DWI
    for modality, level, sign in ((Modality.DWI, 300, 1), (Modality.ADC, 800, -1), (Modality.FLAIR, 200, 0)):
        array = np.where(head, level * (1 + sign * shared + rng.normal(0, 0.07, shape)), 0).astype(np.float32)
        images[modality] = RawImage(Path("x"), Volume(array, grid))
    lesion = gaussian_filter(rng.normal(size=shape), 3) > 0.03
    images[Modality.DWI].volume.array[lesion & head] *= 2
    return RawCase("large", images)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "limit_mb"), [((73, 128, 128), 8), ((100, 220, 220), 12)])
def test_pages_stay_small(tmp_path: Path, stub_ensemble: Build, shape: tuple[int, int, int], limit_mb: float) -> None:
    ensemble = stub_ensemble(*(StubMember(name, level=1.4 + 0.1 * k) for k, name in enumerate("abc")))
    result = segment_raw(large_case(shape), ensemble, SilentWatcher())
    size = written(result, ensemble, tmp_path / "case.html").stat().st_size
    assert 100_000 < size < limit_mb * 1e6
    lossy = np.prod(shape) > 1.1 * MAX_LOSSLESS_VOXELS
    assert ("data:image/jpeg" in (tmp_path / "case.html").read_text()) == lossy


def test_a_page_needs_nothing_but_itself(tmp_path: Path, result: tuple[Result, Ensemble]) -> None:
    text = written(*result, tmp_path / "case.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", text)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "default-src 'none'" in html.unescape(text)


BLANK: dict[str, Any] = {
    "repairs": "",
    "page": "",
    "message": "",
    "volume_ml": None,
    "lesions": None,
    "agreement": None,
    "seconds": None,
}
ROWS = [
    BLANK
    | {
        "case": HOSTILE,
        "status": "done",
        "volume_ml": 2.5,
        "lesions": 3,
        "agreement": 0.9,
        "page": "sub-1/report.html",
    },
    BLANK
    | {"case": "p10", "status": "done", "volume_ml": 12.0, "lesions": 1, "seconds": 3.0, "page": "sub-10/report.html"},
    BLANK | {"case": "p9", "status": "failed", "message": "there is no ADC image"},
]


@pytest.mark.slow
def test_the_index_links_sorts_and_finds(tmp_path: Path, open_page: Callable[[Path], Page]) -> None:
    (tmp_path / "index.html").write_text(render_index_page(ROWS))
    page = open_page(tmp_path / "index.html")

    def cases() -> list[str]:
        return page.locator("#cases tbody tr:visible td:first-child").all_inner_texts()

    assert "3 cases: 2 done, 1 failed" in page.locator("h1").inner_text()
    assert page.locator("#cases a").evaluate_all("links => links.map(link => link.getAttribute('href'))") == [
        "sub-1/report.html",
        "sub-10/report.html",
    ]
    heading = page.locator("#cases th button")
    heading.nth(2).click()
    assert [name[:3] for name in cases()] == [HOSTILE[:3], "p10", "p9"]
    heading.nth(2).click()
    assert [name[:3] for name in cases()] == ["p10", HOSTILE[:3], "p9"], "what has no volume stays last"
    heading.nth(0).click()
    assert cases()[-2:] == ["p9", "p10"], "numbers in names count as numbers"
    page.locator("#find").fill("no adc")
    assert cases() == ["p9"]


@pytest.mark.slow
def test_an_index_of_thousands_has_pages_and_sorts_and_finds_in_all(
    tmp_path: Path, open_page: Callable[[Path], Page]
) -> None:
    many = [
        BLANK | {"case": f"p{n}", "status": "done", "volume_ml": float(5000 - n), "page": f"sub-{n}/r.html"}
        for n in range(5000)
    ]
    (tmp_path / "index.html").write_text(render_index_page(many))
    page = open_page(tmp_path / "index.html")

    def cases() -> list[str]:
        return page.locator("#cases tbody tr:visible td:first-child").all_inner_texts()

    back, on = page.locator("#pager button").nth(0), page.locator("#pager button").nth(1)
    assert (cases()[0], len(cases())) == ("p0", 200)
    assert back.is_disabled()
    on.click()
    assert cases()[0] == "p200"
    assert page.locator("#place").inner_text() == "201 to 400 of 5000"
    page.locator("#cases th button").nth(2).click()
    assert cases()[:2] == ["p4999", "p4998"], "sorted as a whole, and from the beginning"
    page.locator("#find").fill("p499")
    assert set(cases()) == {"p499", *(f"p499{digit}" for digit in range(10))}
    assert page.locator("#shown").inner_text() == "11 of 5000"
    assert page.locator("#pager").is_hidden()
    assert page.locator("#cases a").first.get_attribute("href") == "sub-4999/r.html"


@pytest.mark.slow
def test_the_watch_on_complaints_works(tmp_path: Path, browser: Browser) -> None:
    """A page that errs and fetches is noticed by what `open_page` listens to."""
    (tmp_path / "bad.html").write_text(
        "<img src='https://example.invalid/x.png'><script>console.error('x'); null.y</script>"
    )
    said: list[str] = []
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto((tmp_path / "bad.html").as_uri())
    assert len(said) >= 4
