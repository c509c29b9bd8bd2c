"""Build the content of `report.json`. Pure: nothing is read or measured here."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ensemble import __version__
from ensemble.findings.types import Findings
from ensemble.inference.device import describe_device
from ensemble.metrics import pairwise_dice, volume_ml
from ensemble.pipeline import Ensemble, MemberOutcome, Result
from ensemble.readers.base import RawCase
from ensemble.text import replace_undecodable_in_json
from ensemble.trust.judge import Trust
from ensemble.types import Modality

#: Grows when a field of the report changes its meaning or goes, not when one joins (docs/report.md lists them).
SCHEMA = 1
#: What made a result, as reports and BIDS descriptions name it.
TOOL = "isles-ensemble"
RESEARCH_USE = "For research only. Not a medical device; no clinical decision may rest on this output."
_PACKAGES = ("torch", "nnunetv2", "SimpleITK", "numpy", "scipy", "onnxruntime-gpu")


def build_report(
    raw: RawCase,
    result: Result,
    ensemble: Ensemble,
    findings: Findings | None = None,
    trust: Trust | None = None,
) -> dict[str, Any]:
    """Return the run report of one case, ready for JSON."""
    grid = result.case.grid
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": {"name": TOOL, "version": __version__},
        "notice": RESEARCH_USE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "case": {
            "name": raw.name,
            "files": _files(raw),
            "grid": {
                "size_xyz": list(grid.size),
                "spacing_mm_xyz": list(grid.spacing_mm),
                "origin_mm_lps": list(grid.origin_mm),
                "axes": "".join(grid.axis_letters),
            },
            "brain_volume_ml": round(volume_ml(result.case.brain.array, grid.spacing_zyx_mm), 1),
        },
        "lesion": {"volume_ml": round(result.lesion_ml, 4), "count": result.lesion_count},
        "trust": None if trust is None else trust.as_json(),
        "findings": None if findings is None else findings.as_json(),
        "agreement": voter_agreement(result),
        "fusion": {
            "method": ensemble.config.fusion,
            "voters": list(result.fused.voters),
            "specks_left_out": result.fused.dropped_components,
        }
        | _rule(result, ensemble),
        "members": [_member(outcome, ensemble, grid.spacing_zyx_mm) for outcome in result.outcomes],
        "repairs": list(result.case.repairs),
        "seconds": {"read": round(raw.seconds, 3), "load members": round(ensemble.seconds, 3)}
        | result.seconds
        | ({} if trust is None else {"trust": round(trust.seconds, 3)})
        | ({} if findings is None else {"findings": round(findings.seconds, 3)}),
        "device": describe_device(ensemble.settings.device),
        "config": ensemble.config.as_json(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }
    spelt: dict[str, Any] = replace_undecodable_in_json(report)
    return spelt


def _rule(result: Result, ensemble: Ensemble) -> dict[str, Any]:
    """Return the voting weights and smallest lesion, where they are not the defaults."""
    rule: dict[str, Any] = {}
    if (weights := ensemble.config.member_weights) is not None:
        rule["weights"] = {voter: weights.get(voter, 1.0) for voter in result.fused.voters}
    if ensemble.config.min_lesion_ml:
        rule |= {"min_lesion_ml": ensemble.config.min_lesion_ml, "small_left_out": result.fused.small}
    return rule


def _files(raw: RawCase) -> dict[str, str]:
    """Return the file that each image was read from; a computed ADC has none."""
    files = {str(modality): str(image.path) for modality, image in raw.images.items()}
    if Modality.ADC not in raw.images:
        files[str(Modality.ADC)] = f"computed from {raw.images[Modality.DWI].path}"
    return files


def voter_agreement(result: Result) -> float | None:
    """Return the mean pairwise Dice of the voters' masks (1 if all are empty); None for a single voter."""
    found = pairwise_dice([outcome.prediction.mask.array for outcome in result.outcomes if outcome.prediction])
    return None if found is None else round(found, 4)


def _member(outcome: MemberOutcome, ensemble: Ensemble, spacing_zyx_mm: tuple[float, float, float]) -> dict[str, Any]:
    spec = next(spec for spec in ensemble.specs if spec.name == outcome.member)
    entry: dict[str, Any] = {"name": outcome.member, "kind": spec.kind, "status": outcome.status}
    if outcome.reason:
        entry["reason"] = outcome.reason
    if (prediction := outcome.prediction) is not None:
        entry["volume_ml"] = round(volume_ml(prediction.mask.array, spacing_zyx_mm), 4)
        entry["networks"] = prediction.networks
        entry["arithmetic"] = prediction.arithmetic
        entry["seconds"] = round(outcome.seconds, 3)
    return entry | {"weights_sha256": dict(ensemble.digests.get(spec.name, {}))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
