"""What the tables of `benchmarks.disputed` say of members that say known things."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from benchmarks import disputed
from ensemble.config import RunConfig
from ensemble.fusion import fuse
from ensemble.geometry import Grid
from ensemble.types import AnyArray, FloatArray
from ensemble.volume import Volume
from training.calibrate import Patient

#: Lesions in a row of voxels of 0.01 ml, one voxel apart: voxels, what each member says, whether it is true.
LARGE, TINY, MISSED = (40, (0.95, 0.95, 0.95), True), (5, (0.65, 0.65, 0.65), True), (20, (0.1, 0.1, 0.1), True)
TWO_OF_THREE, FALSE, LARGE_FALSE = (5, (0.7, 0.6, 0.2), False), (20, (0.75,) * 3, False), (40, (0.75,) * 3, False)
PATIENTS = {60: (LARGE, TINY, MISSED, TWO_OF_THREE, FALSE), 61: (LARGE_FALSE,)}


def kept(number: int) -> dict[str, AnyArray]:
    """A patient as `segmented` returns it; small lesions are visible."""
    parts = [(np.full(n, true), np.tile(said, (n, 1)), np.full(n, n < 30)) for n, said, true in PATIENTS[number]]
    lesion, small = (np.concatenate([np.append(part[at], False) for part in parts]) for at in (0, 2))
    said = np.concatenate([np.append(part[1], [(0.0,) * 3], axis=0) for part in parts]).astype(np.float16)
    members = {f"member_{name}": said[None, None, :, at] for at, name in enumerate("abc")}
    return {"lesion": lesion[None, None], "small": (small & lesion)[None, None], "voxel_ml": np.array(0.01), **members}


def test_the_tables_say_what_can_be_counted_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[int] = []
    ensemble = SimpleNamespace(config=RunConfig(min_disputed_ml=2.0), digests={})
    for setting in ("keep_freed_memory", "torch"):  # of the whole process, in which other tests run
        monkeypatch.setattr(disputed, setting, MagicMock())
    monkeypatch.setattr(disputed, "load_from_config", lambda _: ensemble)
    monkeypatch.setattr(disputed, "segmented", lambda number, *_: called.append(number) or kept(number))
    disputed.main(["--patients", "60:60", "--folder", str(tmp_path)])
    disputed.main(["--patients", "60:61", "--folder", str(tmp_path)])
    assert called == [60, 61]  # none twice
    capsys.readouterr()
    disputed.main(["--patients", "60:70", "--folder", str(tmp_path), "--have"])
    assert called == [60, 61]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Patients 60 to 70: 2, 1 of them with a lesion (mean 0.65 ml)"
    # 65 voxels of lesion; masks of 70 (45 of them true), 65, 45, 40, and of 40 in the other patient until 0.75 is too low
    one_false = f"{90 / 130:.3f} | {4 / 6:.3f} | {45 / 65:.3f} | {45 / 65:.3f}"
    large_alone = f"{80 / 105:.3f} | 0.500 | {40 / 65:.3f} | 1.000"
    for row in (
        "| true, below 0.1 ml | 1 | 0.65, 0.65, 0.65 |",
        "| true, 0.1-0.3 ml | 0 | - |",
        "| true, 0.3-2 ml | 1 | 0.95, 0.95, 0.95 |",
        "| false, below 0.1 ml | 1 | 0.50, 0.50, 0.50 |",
        "| false, 0.1-0.3 ml | 1 | 0.75, 0.75, 0.75 |",
        "| false, 0.3-2 ml | 1 | 0.75, 0.75, 0.75 |",
        f"| nothing | {90 / 135:.3f} | {4 / 7:.3f} | {45 / 65:.3f} | {45 / 70:.3f} | 1 of 2 | 1 of 1 |",
        f"| below 0.1 ml, all members agree in no voxel | {one_false} | 1 of 2 | 1 of 1 |",
        f"| **below 2 ml, peak below 0.8 (0.6 below 0.1 ml)** | {90 / 110:.3f} | 0.800 | {45 / 65:.3f} | 1.000 | 1 of 2 | 0 of 1 |",
        f"| below 2 ml, peak below 0.7 (0.6 below 0.1 ml) | {one_false} | 1 of 2 | 1 of 1 |",
        f"| below 2 ml, peak below 0.8 (0.7 below 0.1 ml) | {large_alone} | 0 of 2 | 0 of 1 |",
        f"| below 2 ml, peak below 0.8 (all below 0.1 ml) | {large_alone} | 0 of 2 | 0 of 1 |",
    ):
        assert row in lines
    assert (
        f"| below 2 ml, peak below 0.8 (none below 0.1 ml) | {90 / 115:.3f} | {4 / 6:.3f} | {45 / 65:.3f} | 0.900 | 1 of 2 | 0 of 1 |"
        in lines
    )
    assert sum("**" in line for line in lines) == 1


def test_the_chosen_row_is_what_a_run_makes() -> None:
    draw = np.random.default_rng(0)
    grid = Grid((12, 12, 6), (2.0, 2.0, 2.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    said: dict[str, FloatArray] = {name: draw.random(grid.shape_zyx).astype(np.float16) ** 3 for name in "abc"}
    config, nothing = RunConfig(min_lesion_ml=0.02, member_weights={"a": 2.0}), np.zeros(grid.shape_zyx, bool)
    run = fuse(
        {name: Volume(values.astype(np.float32), grid) for name, values in said.items()},
        config.fusion,
        2.0,
        weights=config.member_weights,
        min_lesion_ml=0.02,
    )
    assert run.small
    assert run.dropped_components
    assert run.mask.array.any()
    before = disputed.fused(Patient(nothing, said, grid.voxel_ml), nothing, config)
    assert np.array_equal(before.after(disputed.Choice(2.0)), run.mask.array)


def test_small_lesions_are_visible_by_their_brightest_tenth() -> None:
    lesion, dwi = np.zeros((1, 1, 100), bool), np.ones((1, 1, 100), np.float32)
    for first, last, level in ((0, 10, 1.5), (20, 30, 1.3), (40, 90, 1.5)):
        lesion[..., first:last], dwi[..., first:last] = True, level
    assert np.flatnonzero(disputed.small_and_visible(lesion, dwi, 0.01)).tolist() == list(range(10))
