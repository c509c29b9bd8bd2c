"""Outputs beside the mask that a user may ask for."""

from __future__ import annotations

from pathlib import Path

from ensemble.config import Extras
from ensemble.outputs.report.run_report import build_report
from ensemble.pipeline import Ensemble, Result
from ensemble.publish import write_json, write_volume
from ensemble.readers.base import RawCase


def write_extras(raw: RawCase, result: Result, ensemble: Ensemble, extras: Extras, folder: Path, suffix: str) -> None:
    """Write what `extras` asks for into `folder`; images end in `suffix`."""
    predictions = [outcome.prediction for outcome in result.outcomes if outcome.prediction is not None]
    if extras.save_probabilities:
        write_volume(result.fused.mean, folder / f"probability{suffix}")
        for prediction in predictions:
            write_volume(prediction.probability, folder / "members" / f"{prediction.member}_probability{suffix}")
    if extras.save_member_masks:
        write_volume(result.fused.votes, folder / f"votes{suffix}")
        for prediction in predictions:
            write_volume(prediction.mask, folder / "members" / f"{prediction.member}_mask{suffix}")
    if extras.report:
        write_report(raw, result, ensemble, folder)
        write_json(build_report(raw, result, ensemble), folder / "report.json")


def write_report(raw: RawCase, result: Result, ensemble: Ensemble, folder: Path) -> None:
    """Write what people look at: `overlay.png` and `report.html`."""
    from ensemble.outputs.report.figure import draw_overlay  # matplotlib takes a second to import
    from ensemble.outputs.report.page import write_page

    draw_overlay(result, folder / "overlay.png")
    write_page(build_report(raw, result, ensemble), result, folder / "report.html")
