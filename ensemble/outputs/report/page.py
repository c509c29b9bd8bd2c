"""HTML pages of a case and of a batch, each a single file that loads nothing and needs no server.

Slices are in the page as PNG sheets (all slices side by side), one a modality; a further sheet holds, bit by bit, the mask and each
voter's mask. A canvas puts them together, so that any browser of the last ten years shows the page, without WebGL (docs/adr/0010).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemble import __version__
from ensemble.findings.types import Findings, LesionFinding
from ensemble.metrics import lesion_components
from ensemble.outputs.report.findings_text import describe_findings, findings_tables, format_category
from ensemble.outputs.report.parts import (
    grey_levels,
    page_script,
    page_template,
    script_safe_json,
    sheet_columns,
    slice_sheet,
)
from ensemble.outputs.report.run_report import RESEARCH_USE
from ensemble.outputs.report.views import WINDOWS, brain_box, case_headline
from ensemble.pipeline import Result
from ensemble.text import replace_undecodable
from ensemble.trust.judge import Trust
from ensemble.types import AnyArray

#: Grey slices of more voxels than this are stored with losses (JPEG), lest the page grows past what browsers like; masks never are.
MAX_LOSSLESS_VOXELS = 4_000_000
#: Rows of a batch's page in the document at a time; browsers do not lay out the others.
SHOWN_ROWS = 200
#: The mask and its voters share the 24 bits of a pixel.
_MAX_VOTERS = 23


def render_case_page(
    report: Mapping[str, Any], result: Result, findings: Findings | None = None, trust: Trust | None = None
) -> str:
    """Return the page of a case; `report` is the output of `build_report`."""
    lesions = lesion_table(result)
    places = [None] * len(lesions) if findings is None or findings.places is None else findings.lesions
    text: str = page_template("case.html").render(
        report=report,
        headline=case_headline(result),
        notice=RESEARCH_USE,
        lesions=[
            lesion | {"place": None if place is None else _place(place)}
            for lesion, place in zip(lesions, places, strict=True)
        ],
        findings=findings,
        trust=trust,
        blocks=() if findings is None else findings_tables(findings),
        words=() if findings is None else tuple(describe_findings(findings)),
        viewer=script_safe_json(_viewer(result)),
        **page_script("slices.js", "case.js"),
    )
    return replace_undecodable(text)


def _place(lesion: LesionFinding) -> dict[str, str]:
    """Return a lesion's location for the table of lesions."""
    return {
        "where": ", ".join(map(format_category, (lesion.side, lesion.region, lesion.structure))),
        "mni": ", ".join(f"{mm:z.0f}" for mm in lesion.centre_mni_mm or ()),
    }


def render_index_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page that lists the cases of a batch; `rows` are those of `summary.csv`."""
    counts = {
        status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(r["status"] for r in rows)
    }
    return page_template("index.html").render(
        rows=rows, shown=SHOWN_ROWS, counts=counts, notice=RESEARCH_USE, version=__version__, **page_script("index.js")
    )


def lesion_table(result: Result) -> list[dict[str, Any]]:
    """Return the lesions, largest first: volume, centre (LPS, mm), axial slices as shown (from 1), and the largest number of votes."""
    grid = result.case.grid
    canonical = grid.canonical()
    labels, count = lesion_components(result.fused.mask.array)
    votes = result.fused.votes.array
    shown = canonical.apply(np.arange(labels.size).reshape(labels.shape))
    slice_of = np.empty(labels.size, np.int64)  # of each voxel, as shown
    slice_of[shown] = np.arange(len(shown))[:, None, None]
    voxels = np.flatnonzero(labels)
    by_lesion = voxels[np.argsort(labels.ravel()[voxels], kind="stable")]
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    lesions = np.split(by_lesion, np.cumsum(sizes)[:-1]) if count else []
    table = []
    for inside in sorted(lesions, key=len, reverse=True):
        slices, areas = np.unique(slice_of[inside] + 1, return_counts=True)
        centre = grid.points_mm(np.mean(np.unravel_index(inside, labels.shape), axis=1))
        table.append(
            {
                "volume_ml": len(inside) * grid.voxel_ml,
                "centre": ", ".join(
                    f"{letters[int(value < 0)]} {abs(value):.0f}"
                    for value, letters in zip(centre, ("LR", "PA", "SI"), strict=True)
                ),
                "centre_lps_mm": [round(float(value), 1) for value in centre],
                "first": int(slices[0]),
                "last": int(slices[-1]),
                "largest": int(slices[areas.argmax()]),
                "unanimous": float((votes.ravel()[inside] == len(result.fused.voters)).mean()),
            }
        )
    return table


def _viewer(result: Result) -> dict[str, Any]:
    """Return the data that the page's script draws."""
    canonical = result.case.grid.canonical()
    rows, columns = brain_box(canonical.apply(result.case.brain.array))
    spacing = canonical.spacing(result.case.grid.spacing_zyx_mm)

    def cut(array: AnyArray) -> AnyArray:
        return canonical.apply(array)[:, rows, columns]

    mask = cut(result.fused.mask.array)
    layers = [o.prediction for o in result.outcomes if o.prediction is not None][:_MAX_VOTERS]
    bits = mask.astype(np.uint32)
    for number, prediction in enumerate(layers, start=1):
        bits |= cut(prediction.mask.array).astype(np.uint32) << number
    area = mask.sum(axis=(1, 2))
    images = []
    for modality, window in WINDOWS.items():
        if modality in result.case.tissue_normalized:
            grey = grey_levels(cut(result.case.tissue_normalized[modality].array), window)
            images.append(
                {"name": modality.label, "sheet": slice_sheet(grey, lossless=grey.size <= MAX_LOSSLESS_VOXELS)}
            )
    return {
        "slices": mask.shape[0],
        "height": mask.shape[1],
        "width": mask.shape[2],
        "columns": sheet_columns(mask.shape[0]),
        "pixel_mm": [spacing[2], spacing[1]],
        "start": int(area.argmax()) if area.any() else mask.shape[0] // 2,
        "images": images,
        "labels": slice_sheet(
            np.stack([bits >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8), lossless=True
        ),
        "voters": [prediction.member for prediction in layers],
        "area": area.tolist(),
    }
