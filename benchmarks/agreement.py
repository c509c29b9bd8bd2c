"""Do all modes give the mask of full mirroring in float32? On real and simulated cases, each shipped member by itself and all together.

    python -m benchmarks.agreement [--real ../shared/cases] [--simulated 6] [--json FILE]

Also tells for which certainty gated mirroring would have spared windows that mirroring changes: the threshold is chosen on simulated
cases. Simulated cases need `../shared` (the simulator's material).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.fusion import fuse
from ensemble.inference import engine
from ensemble.members.manifest import find_members
from ensemble.memory import keep_freed_memory
from ensemble.metrics import dice
from ensemble.prepare.case import PreparedCase, prepare
from ensemble.types import ignore_progress
from training.evaluate import as_raw, real_cases
from training.simulate import SHARED, simulate

FIRST_SEED = 950_000
CERTAINTIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MODES = {
    "mirror": InferenceSettings(),
    "gated": InferenceSettings(tta="gated"),
    "bf16": InferenceSettings(precision="bf16"),
    "none": InferenceSettings(tta="none"),
}


@dataclass(frozen=True)
class Row:
    """One mode of one member (or of the ensemble) in one case."""

    case: str
    member: str
    mode: str
    voxels: int
    differ: int
    dice: float
    cpu_s: float
    error: float
    """Mean difference of the probabilities where full mirroring is in doubt (0.2 to 0.8); 0 where it nowhere is."""


@dataclass(frozen=True)
class WindowSeen:
    """One window of a case: how certain its plain pass was, and what mirroring changed."""

    case: str
    member: str
    certainty: float
    """Smallest probability of a voxel's likeliest class."""
    foreground: int
    """Voxels above 0.5 by all flips."""
    changed: int
    """Voxels that are foreground by the plain pass or by all flips, but not by both."""


def main() -> None:
    parser = argparse.ArgumentParser(description="agreement of all modes with full mirroring in float32")
    parser.add_argument("--real", type=Path, default=SHARED / "cases")
    parser.add_argument("--simulated", type=int, default=6)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    content = run(options.real, options.simulated, options.weights, options.threads)
    print("\n".join(tables(content)))
    if options.json:
        options.json.write_text(json.dumps(content))


def run(real: Path, simulated: int, weights: Path, threads: int) -> dict[str, Any]:
    """Rows and windows of all cases, ready for JSON."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    rows, windows = measure(_cases(real, simulated), weights)
    return {"rows": [asdict(row) for row in rows], "windows": [asdict(window) for window in windows]}


def tables(content: Mapping[str, Any]) -> list[str]:
    """What `run` gave, as Markdown."""
    agreement = agreement_table([Row(**row) for row in content["rows"]])
    certainty = certainty_table([WindowSeen(**window) for window in content["windows"]])
    return [
        "## Masks of other modes against full mirroring in float32: Dice (voxels that differ)",
        "",
        *agreement.splitlines(),
        "",
        "## Windows that gated mirroring would spare, and voxels that mirroring changes in them",
        "",
        *certainty.splitlines(),
    ]


def measure(cases: Iterable[PreparedCase], weights: Path) -> tuple[list[Row], list[WindowSeen]]:
    """All modes of all members in all cases; prints each row."""
    rows: list[Row] = []
    windows: list[WindowSeen] = []
    members = [{mode: NnunetV2Member.load(spec, MODES[mode]) for mode in MODES} for spec in find_members(weights)]
    for case in cases:
        predictions: dict[str, dict[str, MemberPrediction]] = {mode: {} for mode in MODES}
        for by_mode in members:
            member = by_mode["gated"]
            if member.requires - case.modalities:
                continue
            for mode in MODES:
                prediction, cpu = _timed(partial(predict, by_mode[mode], case, mode))
                predictions[mode][member.name] = prediction
                reference = predictions["mirror"][member.name].probability.array
                error = _error(prediction.probability.array, reference)
                rows.append(_row(case.name, member.name, mode, prediction.mask.array, reference > 0.5, cpu, error))
                print(rows[-1], flush=True)
            windows += list(_windows(member, case))
        fused = {mode: _fused(by_member) for mode, by_member in predictions.items()}
        for mode in MODES:
            rows.append(_row(case.name, "ensemble", mode, fused[mode], fused["mirror"]))
            print(rows[-1], flush=True)
    return rows, windows


def predict(member: NnunetV2Member, case: PreparedCase, mode: str) -> MemberPrediction:
    """One member's prediction in one of MODES."""
    return member.predict(case, MODES[mode], ignore_progress)


def agreement_table(rows: list[Row]) -> str:
    """Markdown: by case and member, Dice (differing voxels) and error of each mode beside full mirroring in float32."""
    lines = [
        "| case | member | voxels | gated | bf16 | no mirroring | error: gated, bf16, none | CPU s: mirror, gated, bf16, none |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for key in dict.fromkeys((row.case, row.member) for row in rows):
        by_mode = {row.mode: row for row in rows if (row.case, row.member) == key}
        agree = [f"{by_mode[mode].dice:.4f} ({by_mode[mode].differ})" for mode in list(MODES)[1:]]
        seconds, errors = "", ""
        if key[1] != "ensemble":
            seconds = ", ".join(f"{by_mode[mode].cpu_s:.1f}" for mode in MODES)
            errors = ", ".join(f"{by_mode[mode].error:.4f}" for mode in list(MODES)[1:])
        lines.append(
            f"| {key[0]} | {key[1]} | {by_mode['mirror'].voxels} | {' | '.join(agree)} | {errors} | {seconds} |"
        )
    return "\n".join(lines)


def certainty_table(windows: list[WindowSeen]) -> str:
    """Markdown: for each certainty, windows that would be spared, and voxels that mirroring changes in them."""
    lines = ["| certainty | " + " | ".join(_groups(windows)) + " |", "| --- |" + " --- |" * len(_groups(windows))]
    for certainty in CERTAINTIES:
        cells = []
        for seen in _groups(windows).values():
            spared = [window for window in seen if window.certainty >= certainty]
            cells.append(f"{len(spared)} of {len(seen)} spared, {sum(w.changed for w in spared)} voxels changed")
        lines.append(f"| {certainty} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(windows: list[WindowSeen]) -> dict[str, list[WindowSeen]]:
    groups: dict[str, list[WindowSeen]] = {}
    for window in windows:
        kind = "simulated" if window.case.startswith("simulated") else "real"
        groups.setdefault(f"{window.member}, {kind}", []).append(window)
    return groups


def _windows(member: NnunetV2Member, case: PreparedCase) -> Iterator[WindowSeen]:
    """Each window of a case by the plain pass and by all flips, in gated mirroring's arithmetic."""
    seen: list[tuple[float, int, int]] = []
    original = engine._answers

    def spy(windows: Any, runner: Any, config: Any, passes: Any) -> torch.Tensor:
        plain = runner(windows, [()])
        answers = original(windows, runner, replace(config, certainty=1.1), passes)
        for one, all_flips in zip(plain.softmax(1), answers.softmax(1), strict=True):
            here, there = one[0] < 0.5, all_flips[0] < 0.5
            seen.append((float(one.amax(0).min()), int(there.sum()), int((here != there).sum())))
        return answers

    engine._answers = spy
    try:
        predict(member, case, "gated")
    finally:
        engine._answers = original
    for certainty, foreground, changed in seen:
        yield WindowSeen(case.name, member.name, certainty, foreground, changed)


def _fused(predictions: dict[str, MemberPrediction]) -> np.ndarray:
    return fuse(
        {name: p.probability for name, p in predictions.items()}, "majority", RunConfig.min_disputed_ml
    ).mask.array


def _row(
    case: str, member: str, mode: str, mask: np.ndarray, reference: np.ndarray, cpu: float = 0.0, error: float = 0.0
) -> Row:
    differ = int((mask != reference).sum())
    return Row(case, member, mode, int(mask.sum()), differ, float(dice(reference, mask)), cpu, error)


def _error(probability: np.ndarray, reference: np.ndarray) -> float:
    doubt = (reference > 0.2) & (reference < 0.8)
    return float(np.abs(probability - reference)[doubt].mean()) if doubt.any() else 0.0


def _timed(run: Callable[[], MemberPrediction]) -> tuple[MemberPrediction, float]:
    started = time.process_time()
    return run(), time.process_time() - started


def _cases(real: Path, simulated: int) -> Iterator[PreparedCase]:
    if real.is_dir():
        for truth in real_cases(real):
            yield prepare(truth.raw)
    for number in range(simulated):
        case = simulate(FIRST_SEED + number, SHARED, lesion_free=number % 3 == 2)
        yield prepare(as_raw(f"simulated_{FIRST_SEED + number}", case))


if __name__ == "__main__":
    main()
