"""Ours and nnU-Net's predictor on the same member, case and threads, turn by turn, each in a process of its own.

Both go from files to a mask file with their networks in memory. nnUNetPredictor cannot prepare what the shipped members want (tissue-
normalised intensities, canonical axes, neighbouring slices), so it is given files in which that is done already: its time lacks what
ours includes. Its sequential file interface is taken, since the parallel one starts processes that import nnunetv2 anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import SimpleITK as sitk

from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.members.manifest import find_members
from ensemble.metrics import dice
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, Modality

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mode:
    """One way of running a member."""

    name: str
    engine: str = "ours"
    tta: str = "mirror"
    precision: str = "auto"
    session: str = "auto"


REFERENCE = Mode("nnUNetPredictor", engine="nnunet")
MODES = (
    REFERENCE,
    Mode("ours"),
    Mode("ours, gated", tta="gated"),
    Mode("ours, bf16", precision="bf16"),
    Mode("ours, onnx", session="onnx"),
    Mode("ours, no mirroring", tta="none"),
)


@dataclass
class Measured:
    """What the rounds of one mode gave."""

    mode: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    start_cpu: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    mask: AnyArray | None = None


class Worker:
    """A process that holds one engine with its networks."""

    def __init__(self, job: Mapping[str, Any], scratch: Path, name: str) -> None:
        path, self.mask = scratch / f"{name}.json", scratch / f"{name}_mask.nii.gz"
        path.write_text(json.dumps(dict(job)))
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
        self._log = (scratch / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(path)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.loaded = self._answer()

    def run(self) -> dict[str, Any]:
        """One case, from files to the mask file."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.mask}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {Path(self._log.name).read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(
    member: str,
    files: Mapping[Modality, Path],
    modes: Sequence[Mode],
    *,
    weights: Path,
    threads: int,
    rounds: int,
    device: str,
    scratch: Path,
) -> list[Measured]:
    """Run the modes in turn, `rounds` times; the first round of each is not counted when there are several."""
    scratch.mkdir(parents=True, exist_ok=True)
    (spec,) = find_members(weights, (member,))
    loaded = NnunetV2Member.load(spec, InferenceSettings())
    case = prepare_raw(read_case_files("benchmark", dict(files)))
    channels = _channel_files(loaded, case, scratch)
    packed = _packed(weights, member, scratch) if any(mode.session == "onnx" for mode in modes) else weights
    workers, results = {}, {mode.name: Measured(mode.name) for mode in modes}
    for mode in modes:
        job = {
            "engine": mode.engine,
            "threads": threads,
            "device": device,
            "tta": mode.tta,
            "precision": mode.precision,
            "session": mode.session,
            "weights": str(weights if mode.session != "onnx" else packed),
            "members": [member],
            "folder": str(spec.folder),
            "channels": channels,
            "files": {str(modality): str(path) for modality, path in files.items()},
        }
        workers[mode.name] = Worker(job, scratch, "".join(c if c.isalnum() else "_" for c in mode.name))
        results[mode.name].stages = dict(workers[mode.name].loaded["stages"])
    for turn in range(rounds):
        for name, worker in workers.items():
            spent, result = worker.run(), results[name]
            if turn == 0 and rounds > 1:
                continue  # warming up
            result.wall.append(spent["wall"])
            result.cpu.append(spent["cpu"])
            result.stages |= spent["stages"]
            result.peak_mb = spent["peak_mb"]
    for mode in modes:
        workers[mode.name].close()
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(workers[mode.name].mask))) > 0
        results[mode.name].mask = mask if mode.engine == "nnunet" else loaded._orientation(case.grid).apply(mask)
    return list(results.values())


def table(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Medians, ratios to the first mode and agreement of masks with it."""
    first = results[0]
    assert first.mask is not None
    rows = []
    for result in results:
        assert result.mask is not None
        rows.append(
            {
                "mode": result.mode,
                "wall_s": median(result.wall),
                "cpu_s": median(result.cpu),
                "wall_ratio": median(result.wall) / median(first.wall),
                "cpu_ratio": median(result.cpu) / median(first.cpu),
                "dice": float(dice(first.mask, result.mask)),
                "voxels": int(result.mask.sum()),
                "differ": int((result.mask != first.mask).sum()),
                "start_cpu_s": result.stages["start cpu"],
                "peak_mb": result.peak_mb,
                "stages": result.stages,
            }
        )
    return rows


def _channel_files(member: NnunetV2Member, case: PreparedCase, scratch: Path) -> list[str]:
    """The member's input channels as NIfTI files in the axes that its networks expect."""
    orientation = member._orientation(case.grid)
    z, y, x = orientation.spacing(case.grid.spacing_zyx_mm)
    paths = []
    for number, array in enumerate(member._images(case, orientation)):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array))
        image.SetSpacing((x, y, z))
        path = scratch / f"case_{number:04d}.nii.gz"
        sitk.WriteImage(image, str(path))
        paths.append(str(path))
    return paths


def _packed(weights: Path, member: str, scratch: Path) -> Path:
    from ensemble.members.pack import pack_members

    folder = scratch / "packed"
    if not folder.exists():
        pack_members(weights, folder, "fp32", (member,), onnx=True)
    return folder
