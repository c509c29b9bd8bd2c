"""Write `model_weights/manifest.json`, which lists the shipped members with their digests: `python -m training.manifest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemble.config import SHIPPED_WEIGHTS
from ensemble.files import file_sha256
from ensemble.members.manifest import MANIFEST
from training.members import MEMBERS, MemberSpec

#: Volume (ml) below which disputed lesions are removed, for the shipped members. Chosen on simulated patients, see docs/adr/0015.
SHIPPED_MIN_DISPUTED_ML = 2.0


def entry(spec: MemberSpec, weights: Path, licence: str = "Apache-2.0", **rule: float) -> dict[str, Any]:
    """What the manifest says of one member; `rule` are its weight, min_lesion_ml and min_disputed_ml, where they differ from the usual.

    Files that are not needed for prediction are not listed.
    """
    folder = weights / spec.name
    files = [folder / "dataset.json", folder / "plans.json", *sorted(folder.glob("fold_*/checkpoint_final.pth"))]
    return {
        "name": spec.name,
        "kind": "nnunet",
        "folder": spec.name,
        "channels": list(spec.channels),
        "intensities": "tissue_normalized",
        "orientation": "canonical",
        "spacing_mm": list(spec.spacing_mm),
        "licence": licence,
        **rule,
        "sha256": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }


def write_manifest(weights: Path) -> None:
    """List every member of `MEMBERS` that has a folder in `weights`."""
    shipped = [spec for spec in MEMBERS.values() if (weights / spec.name / "plans.json").is_file()]
    members = [entry(spec, weights, min_disputed_ml=SHIPPED_MIN_DISPUTED_ML) for spec in shipped]
    (weights / MANIFEST).write_text(json.dumps({"members": members}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_manifest(SHIPPED_WEIGHTS)
