"""`python -m benchmarks.agreement`: rows and windows of each mode beside full mirroring."""

from __future__ import annotations

from pathlib import Path

from benchmarks import agreement
from conftest import phantom_case
from ensemble.inference import engine
from ensemble.prepare.case import prepare_raw
from nnunet_folders import build_folder


def test_modes_are_held_against_full_mirroring(tmp_path: Path) -> None:
    folder, original = build_folder(tmp_path), engine._answers
    case = prepare_raw(phantom_case())
    (content,) = agreement.run([case], folder.parent, 1, ("mirror", "none"))
    assert engine._answers is original
    rows = {(row["member"], row["mode"]): row for row in content["rows"]}
    assert len(rows) == 4
    member = folder.name
    assert rows[member, "mirror"]["dice"] == 1
    assert rows[member, "none"]["differ"] > 0
    assert 0 < rows[member, "none"]["cpu_s"] < rows[member, "mirror"]["cpu_s"]
    windows = content["windows"]
    assert windows
    assert all(0.5 <= window["certainty"] <= 1 for window in windows)
    table = "\n".join(agreement.tables(content))
    assert f"| {case.name} | {member} |" in table
    assert "| case | member | voxels | none | error: none | CPU s: mirror, none |" in table
