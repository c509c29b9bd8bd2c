"""A small phantom case, members that need no network, and where the material lies that not every machine has. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from ensemble.config import RunConfig
from ensemble.geometry import Grid
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import AnyArray, Modality, ProgressCallback
from ensemble.volume import Volume, to_sitk

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from ensemble.families.base import InferenceSettings, MemberPrediction
    from ensemble.pipeline import Ensemble
    from ensemble.prepare.case import PreparedCase

# A busy machine is no failure, and a failure must come back when it is looked into.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "test" / "sample"
SHARED = REPOSITORY.parent / "shared"
#: Opens the pages: any Chromium. Those tests are skipped, saying so, where there is none.
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
#: How long a browser may take: a machine may be busy with other things.
PATIENCE_MS = 180_000
#: About 11 degrees about x: the headers of real scans are rarely straight.
OBLIQUE = (1.0, 0.0, 0.0, 0.0, float(np.cos(0.2)), -float(np.sin(0.2)), 0.0, float(np.sin(0.2)), float(np.cos(0.2)))
GRID = Grid(size=(40, 48, 24), spacing_mm=(4.0, 4.0, 5.0), origin_mm=(-80.0, -70.5, 12.25), direction=OBLIQUE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make what a test said fit to be sent to another process: names of files may hold halves of characters."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def log_handlers_end_with_their_test() -> Iterator[None]:
    """A command under test lets the log write to the stdout of that test, which is closed afterwards."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def findings_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bringing a brain to the template takes seconds: tests of other things do without, those of findings take this back."""
    monkeypatch.setenv("ISLES_FINDINGS", "off")


def shared(relative: str) -> Path:
    """A file of the development material; the test is skipped, saying so, where it is missing."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def phantom_arrays(grid: Grid = GRID) -> dict[Modality, AnyArray]:
    """An ellipsoid head of normal tissue with one lesion: bright on DWI, dark on ADC (1e-6 mm^2/s)."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape_zyx], indexing="ij")
    head = (x / 0.85) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    lesion = phantom_lesion(grid)
    noise = np.random.default_rng(0).normal(0, 0.02, grid.shape_zyx)
    dwi = np.where(head, 300 * (1 + noise) * np.where(lesion, 2.2, 1.0), 0)
    adc = np.where(head, 800 * (1 - noise) * np.where(lesion, 0.5, 1.0), 0)
    return {Modality.DWI: dwi.astype(np.float32), Modality.ADC: adc.astype(np.float32)}


def phantom_lesion(grid: Grid = GRID) -> AnyArray:
    """The phantom's lesion, bool (z, y, x): off centre along every axis."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape_zyx], indexing="ij")
    return np.asarray((x - 0.4) ** 2 + (y + 0.2) ** 2 + (z - 0.1) ** 2 < 0.05)


def write_image(array: AnyArray, path: Path, grid: Grid = GRID) -> Path:
    """Write an array (z, y, x) as an image file."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(to_sitk(Volume(array, grid)), str(path))
    return path


def write_contract_case(root: Path, *, flair: bool = False, name: str = "case-1") -> Path:
    """The phantom in the contract's layout below `root`."""
    arrays = phantom_arrays()
    write_image(arrays[Modality.DWI], root / "images" / "dwi-brain-mri" / f"{name}.mha")
    write_image(arrays[Modality.ADC], root / "images" / "adc-brain-mri" / "some-adc.mha")
    if flair:
        write_image(arrays[Modality.DWI] * 0.5, root / "images" / "flair-brain-mri" / "some-flair.mha")
    return root


def phantom_case(flair: bool = False) -> RawCase:
    """The phantom as a reader gives it."""
    arrays = phantom_arrays()
    if flair:
        arrays[Modality.FLAIR] = arrays[Modality.DWI] * 0.5
    images = {modality: RawImage(Path(f"{modality}.mha"), Volume(array, GRID)) for modality, array in arrays.items()}
    return RawCase("phantom", images)


class StubMember:
    """A member that calls lesion what is brighter than `level` times normal tissue on DWI; or raises."""

    def __init__(
        self, name: str, *, level: float = 1.5, needs: tuple[Modality, ...] = (), error: Exception | None = None
    ) -> None:
        self.name = name
        self.requires = frozenset({Modality.DWI, Modality.ADC, *needs})
        self._level = level
        self._error = error

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        from ensemble.families.base import MemberPrediction

        progress(1, 1)
        if self._error is not None:
            raise self._error
        dwi = case.tissue_normalized[Modality.DWI]
        return MemberPrediction(self.name, dwi.like(np.clip(dwi.array - self._level + 0.5, 0, 1)), networks=1)


@pytest.fixture
def stub_ensemble() -> Callable[..., Ensemble]:
    """Builds an ensemble of stub members."""
    from ensemble.families.base import InferenceSettings
    from ensemble.families.spec import MemberSpec
    from ensemble.pipeline import Ensemble

    def build(*members: StubMember, **config: object) -> Ensemble:
        specs = tuple(MemberSpec(member.name, "nnunet", Path("/nowhere")) for member in members)
        return Ensemble(RunConfig(**config), InferenceSettings(), specs, members, seconds=0.0)  # type: ignore[arg-type]

    return build


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights folder for batches of stub members."""
    from batch_runs import write_weights

    return write_weights(tmp_path / "weights")


def write_final_error_line(errors: str) -> str:
    """The one line that a failure writes to stderr, as the platform shows it."""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every folder: to see whether anything was touched."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


def slowness() -> float:
    """How much longer things take now because others keep the machine busy: 1 when nobody does."""
    started, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.2:
        pass
    return max(1.0, (time.monotonic() - started) / 0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the pages are not tested. Install one: apt-get install chromium")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        with playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=PATIENCE_MS) as launched:
            yield launched


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[Path], Page]]:
    """Opens a file offline; any complaint of the browser, or request that leaves the file, fails the test at its end."""
    complaints: list[str] = []
    context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900}, accept_downloads=True)

    def open_(path: Path) -> Page:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        own = (path.as_uri(), "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=PATIENCE_MS)
        return page

    yield open_
    context.close()
    assert complaints == []
