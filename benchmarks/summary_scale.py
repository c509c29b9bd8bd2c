"""Does the summary of tens of thousands of results stay usable?

    python -m benchmarks.summary_scale --work SCRATCH [--results 20000] [--chromium /usr/bin/chromium]

Makes up results (reports as `batch` writes them; empty masks), summarises them as `group` does, and opens the page in Chromium: seconds and
peak memory of table and page, and how long loading, sorting, finding and opening a case take there.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ensemble.batch.case_loop import CaseOutcome
from ensemble.batch.summary import collect_summary, write_summary
from ensemble.outputs.layouts.bids import mask_path
from ensemble.outputs.layouts.bids_entities import BidsEntities


def main() -> None:
    options = _options()
    told = measure(options.work, options.results)
    print(
        json.dumps(
            told | (_in_chromium(options.work / "out" / "index.html", options.chromium) if options.chromium else {}),
            indent=1,
        )
    )


def measure(work: Path, results: int) -> dict[str, Any]:
    """Return what table and page of so many made-up results take."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # for a peak of memory of its own
        return pool.submit(_summarised, work / "out", results).result()


def _summarised(out: Path, results: int) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    places = {f"sub-{number:06d}": BidsEntities(f"{number:06d}") for number in range(results)}
    for number, place in enumerate(places.values()):
        _make_up(out, place, number)
    started, cpu = time.perf_counter(), time.process_time()
    write_summary(out, out, collect_summary(out, places, {name: CaseOutcome(name, "kept") for name in places}).rows)
    return {
        "results": results,
        "summary_s": round(time.perf_counter() - started, 1),
        "summary_cpu_s": round(time.process_time() - cpu, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "csv_mb": round((out / "summary.csv").stat().st_size / 1e6, 1),
        "page_mb": round((out / "index.html").stat().st_size / 1e6, 1),
    }


def _make_up(out: Path, place: BidsEntities, number: int) -> None:
    folder = out / place.folder
    folder.mkdir(parents=True)
    mask = mask_path(place).rpartition("/")[2]
    (folder / mask).touch()
    (folder / "report.html").write_text(f"<title>{place.prefix}</title>")
    members = [{"name": name, "status": "voted", "weights_sha256": {"x.pth": "0" * 64}} for name in ("a", "b", "c")]
    report: dict[str, Any] = {
        "schema": 1,
        "case": {"name": place.prefix, "grid": {"size_xyz": [128, 128, 30], "spacing_mm_xyz": [1.8, 1.8, 5.0]}},
        "lesion": {"volume_ml": (number * 7919) % 10000 / 100, "count": number % 9},
        "agreement": (number * 31) % 1000 / 1000,
        "fusion": {"method": "majority", "voters": ["a", "b", "c"]},
        "members": members,
        "repairs": [f"FLAIR: registered to the DWI, {number % 13}.2 mm" for _ in range(number % 4)],
        "seconds": {"read": 0.1, "prepare": 1.2, "member a": 3.4},
        "batch": {"key": "0" * 64, "recipe": {"members": members}, "outputs": {mask: 0}},
    }
    (folder / "report.json").write_text(json.dumps(report))


def _in_chromium(page_file: Path, chromium: Path) -> dict[str, float]:
    """Return milliseconds of what a reader does on the page."""
    from playwright.sync_api import sync_playwright

    def timed(act: Any) -> float:
        started = time.perf_counter()
        act()
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return round(1000 * (time.perf_counter() - started))

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        told = {"load_ms": timed(lambda: page.goto(page_file.as_uri()))}
        for name, column in (("sort_names_ms", 0), ("sort_volumes_ms", 2)):
            told[name] = timed(page.locator("#cases th button").nth(column).click)
        told["find_ms"] = timed(lambda: page.locator("#find").fill("sub-0001"))
        told["open_case_ms"] = timed(page.locator("#cases a").first.click)
        browser.close()
    return told


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="table and page of many results")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder outside the repository")
    parser.add_argument("--results", type=int, default=20_000)
    parser.add_argument("--chromium", type=Path, help="its program; without, the page is not opened")
    return parser.parse_args()


if __name__ == "__main__":
    main()
