"""A family of members in one file: lesion is what is brighter on DWI than a level, which `threshold.json` holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.errors import WeightsBroken
from ensemble.families.base import Family, InferenceSettings, Member, MemberDescription, MemberPrediction, NetworkSpec
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback

FILE = "threshold.json"


class Threshold(Family):
    """The family."""

    kind = "threshold"
    layout = f"folders with a {FILE}"
    suffixes = frozenset({".json"})

    def discover(self, tree: WeightsTree) -> Iterator[MemberSpec]:
        for path in tree.named(FILE):
            yield MemberSpec(tree.name_of(path.parent), self.kind, path.parent)

    def folds(self, folder: Path) -> tuple[str, ...]:
        return ("all",)

    def describe(self, folder: Path) -> MemberDescription:
        return MemberDescription(("DWI",), tuple(_content(folder)["spacing_mm"]))

    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        return ThresholdMember(spec.name, float(_content(spec.folder)["level"]))

    def networks(self, folder: Path) -> Sequence[NetworkSpec]:
        return ()

    def pack(self, source: Path, target: Path, precision: str) -> None:
        shutil.copyfile(source / FILE, target / FILE)


class Unpackable(Threshold):
    """The same without a packed form."""

    pack = Family.pack


@dataclass(frozen=True)
class ThresholdMember:
    """A loaded member."""

    name: str
    level: float
    requires: frozenset[Modality] = frozenset({Modality.DWI})

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        progress(1, 1)
        dwi = case.tissue_normalized[Modality.DWI]
        return MemberPrediction(self.name, dwi.like(np.clip(dwi.array - self.level + 0.5, 0, 1)), networks=1)


def write_threshold(folder: Path, level: object = 1.5) -> Path:
    """A member's folder."""
    folder.mkdir(parents=True)
    (folder / FILE).write_text(json.dumps({"level": level, "spacing_mm": [1, 1, 1]}))
    return folder


def _content(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        float(content["level"])
        return content
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsBroken("no level", where=path, found=str(error)) from error
