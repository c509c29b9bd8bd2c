"""Batches of phantoms with members that need no weights, in this process or in one that may be killed; and trees to compare."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from conftest import StubMember, phantom_arrays, write_image
from ensemble.batch import run
from ensemble.batch.run import segment_dataset
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.spec import MemberSpec
from ensemble.pipeline import Ensemble
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback

NAMES = ("one", "two")


class LoggedMember(StubMember):
    """Notes in a file each case that it is asked about, and takes its time."""

    def __init__(self, name: str, diary: Path | None, seconds: float, level: float) -> None:
        super().__init__(name, level=level)
        self._diary, self._seconds = diary, seconds

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        if self._diary is not None:
            with self._diary.open("a") as file:
                file.write(case.name + "\n")
        time.sleep(self._seconds)
        if "members fail" in case.name:
            raise RuntimeError("CUDA out of memory")
        return super().predict(case, settings, progress)


def write_weights(root: Path) -> Path:
    """A weights folder whose manifest names members of which nothing else exists."""
    root.mkdir(parents=True, exist_ok=True)
    members = [{"name": name, "kind": "nnunet", "folder": name, "sha256": {"x.pth": "0" * 64}} for name in NAMES]
    (root / "manifest.json").write_text(json.dumps({"members": members}))
    return root


def write_case(folder: Path, *, suffix: str = ".nii.gz", prefix: str = "") -> None:
    """A phantom as `<folder>/[<prefix>]dwi.nii.gz` and so on."""
    for modality, array in phantom_arrays().items():
        write_image(array, folder / f"{prefix}{modality}{suffix}")


def write_dataset(root: Path, good: int) -> Path:
    """`good` phantoms, and cases broken in five ways."""
    for number in range(good):
        write_case(root / f"case {number:03d}")
    arrays = phantom_arrays()
    write_case(root / "cut off")
    whole = root / "cut off" / "dwi.nii.gz"
    whole.write_bytes(whole.read_bytes()[:3000])
    write_image(arrays[Modality.DWI], root / "no adc" / "dwi.nii.gz")
    write_case(root / "constant")
    write_image(arrays[Modality.ADC] * 0, root / "constant" / "adc.nii.gz")
    (root / "empty").mkdir()
    write_case(root / "the members fail")
    return root


def write_bids(root: Path, subjects: Mapping[str, Sequence[str]]) -> Path:
    """A raw BIDS dataset of phantoms: sessions by subject; one called "" lies in the subject's folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "phantoms", "BIDSVersion": "1.10.0"}))
    for subject, sessions in subjects.items():
        for session in sessions:
            parts = [f"sub-{subject}", *([f"ses-{session}"] if session else [])]
            write_case(root.joinpath(*parts, "dwi"), prefix="_".join(parts) + "_")
    return root


def touch(root: Path, *names: str) -> None:
    """Make empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


BROKEN = ("constant", "cut off", "empty", "no adc", "the members fail")


def run_batch(
    dataset: Path | run.BatchCases,
    out: Path,
    weights: Path,
    *,
    resume: bool = True,
    summarise: bool = True,
    parquet: bool = False,
    ray: str | None = None,
    ray_cpus: int = 1,
    report: bool = False,
    extras: ExtraOutputs | None = None,
    diary: Path | None = None,
    seconds: float = 0.0,
    config: dict[str, Any] | None = None,
) -> int:
    """`batch` with members that call bright voxels lesions."""
    settings = RunConfig(**{"weights": weights, "device": "cpu", **(config or {})})
    with patch.object(run, "load_from_config", partial(_load, diary=diary, seconds=seconds)):
        return segment_dataset(
            dataset,
            out,
            settings,
            extras or ExtraOutputs(report=report),
            resume=resume,
            summarise=summarise,
            parquet=parquet,
            ray=ray,
            ray_cpus=ray_cpus,
        )


def _load(config: RunConfig, *, diary: Path | None, seconds: float) -> Ensemble:
    members = tuple(
        LoggedMember(name, diary if name == NAMES[0] else None, seconds, level)
        for name, level in zip(NAMES, (1.5, 1.6), strict=True)
    )
    specs = tuple(MemberSpec(name, "nnunet", Path("/nowhere")) for name in NAMES)
    return Ensemble(config, InferenceSettings(), specs, members, seconds=0.0)


def rows(out: Path) -> dict[str, dict[str, str]]:
    """`summary.csv` by case."""
    with (out / "summary.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@cache
def _context() -> ForkServerContext:
    """Processes come from one that has imported everything, so that each costs no more than its work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["batch_runs", "matplotlib.figure", "ensemble.outputs.report.page"])
    return context


def start_batch(*arguments: Any, **options: Any) -> ForkServerProcess:
    """`run_batch` in a process of its own, which ends with its exit code."""
    process = _context().Process(target=_exit_with, args=(arguments, options))
    process.start()
    return process


def _exit_with(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    raise SystemExit(run_batch(*arguments, **options))


def comparable(root: Path, *, device: bool = True) -> dict[str, Any]:
    """A tree of results without timings and dates, file by file, hidden ones included; without the device, where several worked on it."""
    return {path.relative_to(root).as_posix(): _content(path, device) for path in sorted(root.rglob("*"))}


def _content(path: Path, device: bool) -> Any:
    if path.is_dir():
        return "<folder>"
    if path.suffix == ".json":
        content = _timeless(json.loads(path.read_text()))
        return {name: content[name] for name in content if device or name != "device"}
    if path.name == "summary.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    if path.suffix == ".html":
        text = re.sub(r'<table id="timings">.*?</table>', "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+.]*", "", text)
        return re.sub(r'<td class="number">\d+\.\d</td>(?=\s*</tr>)', "", text)  # seconds stand last
    return path.read_bytes()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        # the size of a page depends on how many digits its timings have
        return {
            name: _timeless(value)
            for name, value in content.items()
            if name not in ("created", "seconds", "report.html")
        }
    return [_timeless(item) for item in content] if isinstance(content, list) else content
