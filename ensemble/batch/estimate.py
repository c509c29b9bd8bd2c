"""`batch --dry-run`: list the cases that would be refused by their headers, and estimate time and memory for the others.

Time is proportional to the activations that go through the networks: windows x flips x bytes of a window (benchmarks/RESULTS.md, "Growth").
Memory is that of docs/architecture.md. Neither knows whether a skull will be stripped.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.batch.layouts import FoundCase
from ensemble.batch.run import BatchCases
from ensemble.batch.selection import Placed
from ensemble.batch.summary import recorded_costs
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import InputRefused
from ensemble.families.base import NetworkSpec
from ensemble.families.registry import family_of
from ensemble.families.spec import MemberSpec
from ensemble.geometry import Grid
from ensemble.inference.device import describe_device, resolve_device
from ensemble.inference.tiling import window_starts
from ensemble.logging_setup import redirect_messages_to_stderr
from ensemble.members.manifest import find_members
from ensemble.outputs.layouts.bids import read_report, refuse_occupied_case_folder, refuse_unsafe_output_folder
from ensemble.readers.base import RawImage
from ensemble.readers.dicom.read import is_read_as_dicom
from ensemble.readers.inspect import inspect_path
from ensemble.readers.stored import read_grid
from ensemble.text import escape_invisible, replace_undecodable_in_json
from ensemble.types import Modality

log = logging.getLogger(__name__)

#: CPU seconds for a GiB of activations, for reading and preparing a case, and for its findings: docs/adr/0027 says how they were measured.
CPU_S_PER_GIB, PREPARE_S, FINDINGS_S = 1.6, 1.0, 2.5
#: What Python, PyTorch, OpenVINO and SciPy take before any case, in bytes.
BASE_BYTES = 1100 * 2**20
#: A brain's largest extent along x, y and z (mm): windows beyond it hold nothing and are computed once.
_BRAIN_MM = (160.0, 190.0, 160.0)
#: Earlier results by which times are corrected.
_SAMPLE = 20


@dataclass(frozen=True)
class CaseEstimate:
    """The estimated time and peak memory for one case, or why it would be refused. Made from file names and headers only."""

    case: str
    problem: InputRefused | None = None
    size: tuple[int, ...] = ()
    """Voxels of the DWI along x, y, z."""
    spacing_mm: tuple[float, ...] = ()
    seconds: float | None = None
    memory_bytes: int = 0


@dataclass(frozen=True)
class CostModel:
    """Estimates time and memory per case on this machine."""

    networks: Sequence[NetworkSpec]
    mirrored: bool
    """Whether windows are computed once for each flip."""
    findings: bool
    factor: float | None
    """Seconds per CPU second of the constants; None if unknown, as on a GPU without earlier results."""

    @classmethod
    def of(
        cls, specs: Sequence[MemberSpec], config: RunConfig, extras: ExtraOutputs, device: str, out: Path
    ) -> CostModel:
        """Make the model for these members, corrected by the timings of results already in `out`. Raises WeightsBroken."""
        import torch

        networks = [network for spec in specs for network in family_of(spec).networks(spec.folder)]
        usual = 1 / torch.get_num_threads() if device == "cpu" else None
        model = cls(networks, config.tta != "none", extras.findings, usual)
        took = stated = 0.0
        for seconds, size, spacing_mm in itertools.islice(recorded_costs(out, describe_device(device)), _SAMPLE):
            took, stated = took + seconds, stated + model.cpu_seconds(size, spacing_mm)
        return replace(model, factor=took / stated) if stated else model

    def cpu_seconds(self, size: Sequence[int], spacing_mm: Sequence[float]) -> float:
        """Return the time (s) that one core needs for a case with this DWI size and spacing (x, y, z)."""
        gib = sum(self._activations(network, size, spacing_mm) for network in self.networks) / 2**30
        return CPU_S_PER_GIB * gib + PREPARE_S + FINDINGS_S * self.findings

    def memory(self, size: Sequence[int]) -> int:
        """Return the peak memory (bytes) of a process that holds all networks and segments such a case."""
        import torch

        from ensemble.inference.capacity import window_batch_size

        cpu, voxels = torch.device("cpu"), math.prod(size)
        held = sum(network.weights.stat().st_size for network in self.networks)
        working = [
            4 * voxels * (4 + 3 * network.channels + 2 * 2 + 4)
            + network.window_bytes * window_batch_size(network.window_bytes, len(network.patch), cpu)
            for network in self.networks
        ]
        return BASE_BYTES + 2 * held + max(working, default=0)

    def _activations(self, network: NetworkSpec, size: Sequence[int], spacing_mm: Sequence[float]) -> float:
        """Return the total bytes of activations that pass through a network for one case."""
        extent = [min(n * mm, most) for n, mm, most in zip(size, spacing_mm, _BRAIN_MM, strict=True)]
        axes = len(network.patch)
        windows = 1 if axes == 3 else math.ceil(extent[2] / spacing_mm[2])
        for mm, voxel, window in zip(extent[::-1][-axes:], network.spacing_mm, network.patch, strict=True):
            windows *= len(window_starts(max(math.ceil(mm / voxel), window), window, 0.5))
        return windows * (2**axes if self.mirrored else 1) * network.window_bytes


def estimate_case(placed: Placed, root: Path, model: CostModel) -> CaseEstimate:
    """Return the estimated time and memory of a case, or why it would be refused, from its file names and headers."""
    case, place = placed
    try:
        if case.problem is not None:
            raise case.problem
        refuse_occupied_case_folder(root, place)
        dwi = _grids(case)[Modality.DWI]
    except InputRefused as refused:
        return CaseEstimate(case.name, refused)
    seconds = None if model.factor is None else model.factor * model.cpu_seconds(dwi.size, dwi.spacing_mm)
    return CaseEstimate(case.name, None, dwi.size, dwi.spacing_mm, seconds, model.memory(dwi.size))


def _grids(case: FoundCase) -> dict[Modality, Grid]:
    """Return the grids of a case's images. Raises InputRefused for the first one that its header refuses."""
    grids = {}
    for modality, path in case.files.items():
        if not is_read_as_dicom(path):
            grids[modality] = read_grid(path, modality.label)
            continue
        found: Any = inspect_path(path, None).images[modality]
        if isinstance(found, InputRefused):
            raise found
        grids[modality] = found.volume.grid if isinstance(found, RawImage) else found
    return grids


def dry_run(
    dataset: BatchCases,
    out: Path,
    config: RunConfig,
    extras: ExtraOutputs,
    *,
    resume: bool = True,
    as_json: bool = False,
) -> int:
    """Print what `batch` would do; write nothing. Returns 3 if it would refuse a case, else 0. Raises as `batch` does."""
    with redirect_messages_to_stderr() if as_json else nullcontext():
        refuse_unsafe_output_folder(out, dataset.path)
        _, selected = dataset.find(out)
        device = resolve_device(config.device)
        model = CostModel.of(find_members(config.weights_folder, config.members), config, extras, device, out)
        there = {case.name for case, place in selected if resume and read_report(out, place) is not None}
        expected = [estimate_case(placed, out, model) for placed in selected]
    report = _report(expected, there, describe_device(device))
    for line in json.dumps(replace_undecodable_in_json(report), indent=2).split("\n") if as_json else _lines(report):
        log.info("%s", line)
    return InputRefused.exit_code if report["total"]["refused"] else 0


def _report(expected: Sequence[CaseEstimate], there: Collection[str], device: str) -> dict[str, Any]:
    """Return the estimate as JSON data."""
    cases = []
    for case in expected:
        entry: dict[str, Any] = {"case": case.case, "status": "refused" if case.problem else "ready"}
        if case.problem is not None:
            entry["message"] = " ".join(str(case.problem).split())
        else:
            entry |= {
                "earlier_result": case.case in there,
                "voxels": math.prod(case.size),
                "seconds": None if case.seconds is None else round(case.seconds, 1),
                "memory_mb": round(case.memory_bytes / 2**20),
            }
        cases.append(entry)
    ready = [case for case in expected if case.problem is None]
    seconds = [case.seconds for case in ready if case.seconds is not None]
    return {
        "device": device,
        "total": {
            "cases": len(cases),
            "refused": len(cases) - len(ready),
            "earlier_results": sum(entry.get("earlier_result", False) for entry in cases),
            "seconds": round(sum(seconds)) if len(seconds) == len(ready) else None,
            "memory_mb": max((round(case.memory_bytes / 2**20) for case in ready), default=0),
        },
        "cases": cases,
    }


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the estimate as text: the refused cases, then the totals."""
    total = report["total"]
    for entry in report["cases"]:
        if entry["status"] == "refused":
            yield f"{escape_invisible(entry['case'])}: would be refused: {escape_invisible(entry['message'])}"
    yield f"{total['cases']} cases, {total['refused']} refused by their names or headers"
    if total["earlier_results"]:
        yield f"{total['earlier_results']} have results, which are kept if images, weights and options are unchanged"
    if total["seconds"] is None:
        yield f"seconds: unknown until there are results ({report['device']})"
    else:
        hours = f" ({total['seconds'] / 3600:.1f} h)" if total["seconds"] > 3600 else ""
        yield f"about {total['seconds']} s{hours} for all on {report['device']}, without stripping skulls"
    yield f"about {total['memory_mb']} MB of memory"
